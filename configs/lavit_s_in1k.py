"""LaViT-S on ImageNet-1K, 300 epochs at 224."""
_base_ = './lavit_t_in1k.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.2))
