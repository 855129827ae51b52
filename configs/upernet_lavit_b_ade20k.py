"""UPerNet with LaViT-B on ADE20K."""
_base_ = './upernet_lavit_t_ade20k.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint='work_dirs/lavit_b_in1k/epoch_300.pth')))
