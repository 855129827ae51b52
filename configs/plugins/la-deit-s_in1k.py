"""DeiT-S with less attention from layer 4 of 12 on, on ImageNet-1K (our experiment)."""
_base_ = '../baselines/deit-s_in1k.py'
custom_imports = dict(
    imports=['mmlavit.models.backbones.la_vit'], allow_failed_imports=False)

model = dict(backbone=dict(type='LessAttentionViT', first_la_layer=4))
