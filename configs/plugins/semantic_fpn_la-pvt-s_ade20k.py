"""Semantic FPN with less attention in PVT-S on ADE20K; begins from PVT-S (our experiment)."""
_base_ = '../semantic_fpn_lavit_t_ade20k.py'
custom_imports = dict(
    imports=['mmlavit', 'mmlavit.models.backbones.la_pvt'], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(test_cfg=dict(size_divisor=32)),  # PVT takes no other sides
    backbone=dict(
        _delete_=True,
        type='LessAttentionPVT',
        num_layers=[3, 4, 6, 3],
        num_va_layers=(3, 4, 3, 1),
        init_cfg=dict(checkpoint='https://github.com/whai362/PVT/'
                      'releases/download/v2/pvt_small.pth')),
    neck=dict(in_channels=[64, 128, 320, 512]))
