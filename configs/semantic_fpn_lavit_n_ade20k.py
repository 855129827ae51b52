"""Semantic FPN with LaViT-N and a light neck on ADE20K, 80k, 512 crop,
batch 16 = 8 GPUs x 2.

A base for data of your own, see docs/own_data.md.
"""
_base_ = './semantic_fpn_lavit_t_ade20k.py'

model = dict(
    backbone=dict(
        arch='nano',
        pretrain_img_size=128,
        drop_path_rate=0.,
        init_cfg=dict(
            checkpoint='{{ fileDirname }}/../checkpoints/lavit_n_tin100-e3a49569.pth')),
    neck=dict(in_channels=[32, 64, 128, 192], out_channels=64),
    decode_head=dict(in_channels=[64, 64, 64, 64], channels=64))
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
