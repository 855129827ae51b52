"""Semantic FPN with LaViT-N on scanned digits; see tools/make_digits.py for the data.

Begins from LaViT-N's weights and trains on the CPU in minutes. The classes are the
background and the digits. From scratch: ``--cfg-options model.backbone.init_cfg=None``.
"""
_base_ = [
    '_base_/models/semantic_fpn_lavit_t.py', 'mmseg::_base_/default_runtime.py',
    '_base_/runtime.py'
]

image_size = (160, 160)
num_epochs = 6

model = dict(
    data_preprocessor=dict(size=image_size),
    backbone=dict(
        arch='nano',
        pretrain_img_size=128,
        drop_path_rate=0.,
        init_cfg=dict(
            checkpoint='{{ fileDirname }}/../checkpoints/lavit_n_tin100-e3a49569.pth')),
    neck=dict(in_channels=[32, 64, 128, 192], out_channels=64),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        num_classes=11,
        norm_cfg=dict(type='BN')))

dataset = dict(
    type='BaseSegDataset',
    data_root='data/digits/',
    metainfo=dict(
        classes=('background', *'0123456789'),
        palette=[[0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25],
                 [0, 130, 200], [245, 130, 48], [145, 30, 180], [70, 240, 240],
                 [240, 50, 230], [210, 245, 60], [250, 190, 212]]),
    img_suffix='.png',
    seg_map_suffix='.png')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')  # no mirrored digits
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='masks/train'),
        pipeline=train_pipeline,
        **dataset))
val_dataloader = dict(
    batch_size=10,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='images/val', seg_map_path='masks/val'),
        pipeline=test_pipeline,
        **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

train_cfg = dict(by_epoch=True, max_epochs=num_epochs, val_interval=3)
val_cfg = dict()
test_cfg = dict()
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        by_epoch=True,
        convert_to_iter_based=True)
]
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='MergedGroupsConstructor',
    optimizer=dict(
        type='AdamW',
        lr=2e-3,
        betas=(0.9, 0.99),
        weight_decay=0.05,
        foreach=True),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.),
    clip_grad=dict(max_norm=10, norm_type=2))
auto_scale_lr = dict(enable=False, base_batch_size=4)
randomness = dict(seed=0)
log_processor = dict(by_epoch=True)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=25),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
