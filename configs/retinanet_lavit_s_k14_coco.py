"""RetinaNet with LaViT-S on COCO, 1x, with at most 14 x 14 keys: faster on large images.

The classifier that it begins from is the same, for at 224 px the cap changes nothing.
"""
_base_ = './retinanet_lavit_s_coco.py'

model = dict(backbone=dict(max_key_grid=14))
