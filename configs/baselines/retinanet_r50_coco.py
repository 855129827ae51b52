"""RetinaNet with ResNet-50: mmdet's own, 1x, batch 16.

With its own SGD, by which the published rows of convolutional networks are made.
"""
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
