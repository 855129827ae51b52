"""RetinaNet with ResNeXt-101 32x4d: mmdet's own, 1x, batch 16.

With its own SGD, by which the published rows of convolutional networks are made.
"""
_base_ = 'mmdet::retinanet/retinanet_x101-32x4d_fpn_1x_coco.py'
