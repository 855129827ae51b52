"""LaViT-N on 100 classes of Tiny-ImageNet, small enough for a CPU.

20 epochs: 12 at 64 px, 5 at 96, 3 at 128.
"""
_base_ = [
    '_base_/datasets/tiny_imagenet100_128.py',
    'mmpretrain::_base_/default_runtime.py', '_base_/runtime.py'
]

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='LaViT',
        arch='nano',
        pretrain_img_size=128,
        out_indices=(3, ),
        drop_path_rate=0.05,
        dp_loss=dict()),  # the published weights were trained with it
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=100,
        in_channels=192,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')))

max_epochs = 20
optim_wrapper = dict(
    constructor='MergedGroupsConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0))
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        end=1,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        by_epoch=True,
        begin=1,
        end=max_epochs,
        convert_to_iter_based=True)
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=2)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=128)
custom_hooks = [
    dict(type='InvalidLossHook'),
    dict(
        type='SwitchRecipeHook',
        schedule=[
            dict(action_epoch=13, train_pipeline={{_base_.train_pipeline_96}}),
            dict(action_epoch=18, train_pipeline={{_base_.train_pipeline_128}})
        ])
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best='auto'))
