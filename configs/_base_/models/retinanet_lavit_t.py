_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='LaViT',
        arch='tiny',
        drop_path_rate=0.1,
        # There are no published weights. Give the path of a classifier's
        # checkpoint, or init_cfg=None to train from scratch: see
        # docs/reproduce.md.
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/lavit_t_in1k/epoch_300.pth',
            prefix='backbone.')),
    # RetinaNet's pyramid begins at stride 8.
    neck=dict(in_channels=[64, 128, 320, 448], start_level=1))
