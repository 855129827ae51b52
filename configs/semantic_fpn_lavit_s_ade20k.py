"""Semantic FPN with LaViT-S on ADE20K."""
_base_ = './semantic_fpn_lavit_t_ade20k.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='work_dirs/lavit_s_in1k/epoch_300.pth')))
