"""RetinaNet with LaViT-N and a light head on COCO, 416 px, 12 epochs,
batch 16 = 8 GPUs x 2.

A base for data of your own, see docs/own_data.md. The head is the demo's, with the
anchors and levels of RetinaNet.
"""
_base_ = './retinanet_lavit_t_coco.py'

image_size = (416, 416)
model = dict(
    backbone=dict(
        arch='nano',
        pretrain_img_size=128,
        drop_path_rate=0.,
        init_cfg=dict(
            checkpoint='{{ fileDirname }}/../checkpoints/lavit_n_tin100-e3a49569.pth')),
    neck=dict(
        in_channels=[32, 64, 128, 192],
        out_channels=64,
        norm_cfg=dict(type='BN')),
    bbox_head=dict(
        type='RetinaSepBNHead',
        num_ins=5,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=dict(type='BN')))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
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
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(bypass_duplicate=True),  # the head's levels share weights
    clip_grad=dict(max_norm=10, norm_type=2))
