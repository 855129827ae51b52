"""RetinaNet with less attention in PVTv2-B2's layout on COCO, 1x.

Training begins from PVTv2-B2's ImageNet weights, which are converted on loading: see
docs/pvtv2.md. mmdet's retinanet_pvtv2-b2 is the same network without less attention.
"""
_base_ = './retinanet_lavit_t_coco.py'

model = dict(
    backbone=dict(
        arch='pvtv2_b2',
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='https://github.com/whai362/PVT/'
            'releases/download/v2/pvt_v2_b2.pth')),
    neck=dict(in_channels=[64, 128, 320, 512]))
