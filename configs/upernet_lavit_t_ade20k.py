"""UPerNet with LaViT-T on ADE20K, 160k, 512 crop, batch 16 = 8 GPUs x 2.

The S and B configs inherit this one. For ``reduce_zero_label`` see the Semantic
FPN config.
"""
_base_ = [
    'mmseg::_base_/models/upernet_r50.py', 'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_160k.py'
]
custom_imports = dict(imports=['mmlavit'], allow_failed_imports=False)
custom_hooks = [dict(type='InvalidLossHook')]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='LaViT',
        arch='tiny',
        drop_path_rate=0.1,
        dp_loss=dict(),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/lavit_t_in1k/epoch_300.pth',
            prefix='backbone.')),
    decode_head=dict(in_channels=[64, 128, 320, 448], num_classes=150),
    auxiliary_head=dict(in_channels=320, num_classes=150))

train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(enable=False, base_batch_size=16)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=6e-5, weight_decay=0.01),
    constructor='MergedGroupsConstructor',
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.))
param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(
        type='PolyLR',
        eta_min=0.,
        power=1.0,
        begin=1500,
        end=160000,
        by_epoch=False)
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='mIoU'))
