"""Semantic FPN with less attention in Swin-T on ADE20K; begins from Swin-T (our experiment)."""
_base_ = '../baselines/semantic_fpn_swin-t_ade20k.py'
custom_imports = dict(
    imports=['mmlavit', 'mmlavit.models.backbones.la_swin'], allow_failed_imports=False)

model = dict(
    backbone=dict(  # mmdet's Swin, with the weights of its authors
        type='LessAttentionSwin',
        la_layers=(6, 7, 8, 9),
        convert_weights=True,
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/'
            'download/v1.0.0/swin_tiny_patch4_window7_224.pth')))
