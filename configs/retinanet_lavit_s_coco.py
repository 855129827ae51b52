"""RetinaNet with LaViT-S on COCO, 1x."""
_base_ = './retinanet_lavit_t_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(checkpoint='work_dirs/lavit_s_in1k/epoch_300.pth')))
