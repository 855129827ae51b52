"""RetinaNet with less attention in PVTv2-B0's layout on COCO, 1x; see the B2 config."""
_base_ = './retinanet_lavit_pvtv2-b2_coco.py'

model = dict(
    backbone=dict(
        arch='pvtv2_b0',
        init_cfg=dict(checkpoint='https://github.com/whai362/PVT/'
                      'releases/download/v2/pvt_v2_b0.pth')),
    neck=dict(in_channels=[32, 64, 160, 256]))
