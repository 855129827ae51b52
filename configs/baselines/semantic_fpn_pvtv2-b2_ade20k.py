"""Semantic FPN with mmdet's PVTv2-B2, otherwise as with LaViT."""
_base_ = '../semantic_fpn_lavit_t_ade20k.py'
custom_imports = dict(imports=['mmlavit', 'mmdet.models'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet.PyramidVisionTransformerV2',
        embed_dims=64,
        num_layers=[3, 4, 6, 3],
        init_cfg=dict(
            checkpoint='https://github.com/whai362/PVT/releases/download/'
            'v2/pvt_v2_b2.pth')),
    neck=dict(in_channels=[64, 128, 320, 512]))
