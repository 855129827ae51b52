"""RetinaNet with LaViT-N on made digits: the demo's data, head and schedule."""
_base_ = './retinanet_lavit_digits.py'

model = dict(
    backbone=dict(arch='nano', pretrain_img_size=128),
    neck=dict(in_channels=[32, 64, 128, 192]))
