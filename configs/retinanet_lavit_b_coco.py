"""RetinaNet with LaViT-B on COCO, 1x."""
_base_ = './retinanet_lavit_t_coco.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='work_dirs/lavit_b_in1k/epoch_300.pth')))
