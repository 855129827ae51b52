"""RetinaNet with LaViT-T on COCO, 1x (12 epochs), batch 16 = 8 GPUs x 2.

The other RetinaNet configs inherit this one.
"""
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py'
]
custom_imports = dict(imports=['mmlavit'], allow_failed_imports=False)
custom_hooks = [dict(type='InvalidLossHook')]

model = dict(
    backbone=dict(
        _delete_=True,
        type='LaViT',
        arch='tiny',
        drop_path_rate=0.1,
        dp_loss=dict(),
        # RetinaNet's pyramid begins at stride 8. A map that nobody reads would
        # leave its norm without gradients, which DDP refuses.
        out_indices=(1, 2, 3),
        # There are no published weights. Give the path of a classifier's
        # checkpoint, or init_cfg=None to train from scratch: see the README.
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/lavit_t_in1k/epoch_300.pth',
            prefix='backbone.')),
    neck=dict(in_channels=[128, 320, 448], start_level=0))

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4),
    constructor='MergedGroupsConstructor',
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.))
