"""Semantic FPN with LaViT-T on ADE20K, 80k, 512 crop, batch 16 = 8 GPUs x 2.

The S and B configs inherit this one. ADE20K's masks number 150 classes from 1
and call the rest 0; its base loads them with ``reduce_zero_label=True``, which
makes 0 the ignored label 255 and moves the classes to 0..149. For masks of your own
whose classes begin at 0 set it to False, in the data sets and in every
``LoadAnnotations``, or the first class is ignored.
"""
_base_ = [
    'mmseg::_base_/models/fpn_r50.py', 'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py', 'mmseg::_base_/schedules/schedule_80k.py'
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
    neck=dict(in_channels=[64, 128, 320, 448]),
    decode_head=dict(num_classes=150))

train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(enable=False, base_batch_size=16)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4),
    constructor='MergedGroupsConstructor',
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.))
param_scheduler = [
    dict(
        type='PolyLR',
        eta_min=0.,
        power=0.9,
        begin=0,
        end=80000,
        by_epoch=False)
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='mIoU'))
