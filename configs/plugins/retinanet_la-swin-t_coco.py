"""RetinaNet with less attention in Swin-T on COCO, 1x; begins from Swin-T (our experiment)."""
_base_ = '../baselines/retinanet_swin-t_coco.py'
custom_imports = dict(
    imports=['mmlavit.models.backbones.la_swin'], allow_failed_imports=False)

model = dict(
    backbone=dict(type='LessAttentionSwin', la_layers=(6, 7, 8, 9)))
