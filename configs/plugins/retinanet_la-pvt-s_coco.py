"""RetinaNet with less attention in PVT-S on COCO, 1x; begins from PVT-S (our experiment)."""
_base_ = '../baselines/retinanet_pvt-s_coco.py'
custom_imports = dict(
    imports=['mmlavit.models.backbones.la_pvt'], allow_failed_imports=False)

model = dict(
    backbone=dict(type='LessAttentionPVT', num_va_layers=(3, 4, 3, 1)))
