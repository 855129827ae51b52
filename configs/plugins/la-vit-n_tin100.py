"""The narrow ViT with less attention in its last four layers (our experiment)."""
_base_ = '../baselines/vit-n_tin100.py'
custom_imports = dict(
    imports=['mmlavit.models.backbones.la_vit'], allow_failed_imports=False)

model = dict(backbone=dict(type='LessAttentionViT', first_la_layer=8))
