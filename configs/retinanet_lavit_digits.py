"""A narrow LaViT and a light RetinaNet head on scanned digits.

Trains from scratch on the CPU in minutes; see tools/make_digits.py for the
data. Everything that is not named here is as in the COCO config.
"""
_base_ = './retinanet_lavit_t_coco.py'

image_size = (160, 160)
num_epochs = 6

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=(32, 64, 128, 160),
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 4, 5),
            num_va_layers=(2, 2, 1, 0),
            mlp_ratios=(2, 2, 4, 4)),
        drop_path_rate=0.,
        init_cfg=None),
    neck=dict(
        in_channels=[32, 64, 128, 160],
        out_channels=64,
        num_outs=3,
        norm_cfg=dict(type='BN')),
    bbox_head=dict(
        type='RetinaSepBNHead',  # one running mean for all levels fits none
        num_ins=3,
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=dict(type='BN'),
        anchor_generator=dict(
            octave_base_scale=3,
            ratios=[1.5, 2.2],  # digits are taller than wide
            strides=[8, 16, 32])))

data_root = 'data/digits/'
metainfo = dict(classes=tuple('0123456789'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=image_size, keep_ratio=True),  # no mirrored digits
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                   'scale_factor'))
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/train.json',
        data_prefix=dict(img='images/train/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=1),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=10,
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/val.json',
        data_prefix=dict(img='images/val/'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=num_epochs, val_interval=3)
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
    optimizer=dict(
        lr=2e-3,
        betas=(0.9, 0.99),  # 2,250 steps are few for 0.999
        weight_decay=0.05,
        foreach=True),
    paramwise_cfg=dict(bypass_duplicate=True),  # the head's levels share weights
    clip_grad=dict(max_norm=10, norm_type=2))
auto_scale_lr = dict(base_batch_size=4)
randomness = dict(seed=0)
default_hooks = dict(
    logger=dict(interval=25),  # what the demo's bar follows; divides 375
    checkpoint=dict(max_keep_ckpts=2),
    # A picture shows what was drawn last, and that is the lowest score.
    visualization=dict(score_thr=0.5))
