"""The demo: RetinaNet with LaViT-N and a light head on scanned digits.

    bash tools/demo.sh

Begins from LaViT-N's weights and trains on the CPU in minutes; see
tools/make_digits.py for the data. From scratch:
``--cfg-options model.backbone.init_cfg=None``.
"""
_base_ = './retinanet_lavit_digits.py'

model = dict(
    backbone=dict(
        arch='nano',
        pretrain_img_size=128,
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='{{ fileDirname }}/../checkpoints/lavit_n_tin100-e3a49569.pth',
            prefix='backbone.')),
    neck=dict(in_channels=[32, 64, 128, 192]))
