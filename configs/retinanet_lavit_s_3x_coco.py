"""RetinaNet with LaViT-S on COCO, 3x with multi-scale training."""
_base_ = './retinanet_lavit_t_3x_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(checkpoint='work_dirs/lavit_s_in1k/epoch_300.pth')))
