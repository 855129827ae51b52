"""Semantic FPN with mmseg's Swin-T, otherwise as with LaViT."""
_base_ = '../semantic_fpn_lavit_t_ade20k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmsegmentation/v0.5/'
            'pretrain/swin/swin_tiny_patch4_window7_224_20220317-1cdeb081.pth')
    ),
    neck=dict(in_channels=[96, 192, 384, 768]))
