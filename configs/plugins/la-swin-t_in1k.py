"""Swin-T with less attention in 4 of stage 3's 6 layers, on ImageNet-1K (our experiment)."""
_base_ = '../baselines/swin-t_in1k.py'
custom_imports = dict(
    imports=['mmlavit.models.backbones.la_swin_cls'], allow_failed_imports=False)

model = dict(
    backbone=dict(type='LessAttentionSwinClassifier', la_layers=(6, 7, 8, 9)))
