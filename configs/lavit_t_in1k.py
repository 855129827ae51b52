"""LaViT-T on ImageNet-1K, 300 epochs at 224, batch 1024 = 8 GPUs x 128.

The S and B configs inherit this one. For a moving average of the weights add
``dict(type='EMAHook', momentum=1e-4)`` to ``custom_hooks`` in a child config.
"""
_base_ = [
    'mmpretrain::_base_/models/van/van_tiny.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py'
]
custom_imports = dict(imports=['mmlavit'], allow_failed_imports=False)
custom_hooks = [dict(type='InvalidLossHook')]

# RandAugment and random erasing are the data base's; label smoothing, mixup and
# cutmix the model base's.
model = dict(
    backbone=dict(
        _delete_=True,
        type='LaViT',
        arch='tiny',
        out_indices=(3, ),
        drop_path_rate=0.1,
        dp_loss=dict()),
    head=dict(in_channels=448))

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = val_dataloader

optim_wrapper = dict(
    constructor='MergedGroupsConstructor', clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        end=5,
        convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5)
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
