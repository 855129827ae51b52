_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='LaViT',
        arch='tiny',
        drop_path_rate=0.1,
        dp_loss=dict(),
        # RetinaNet's pyramid begins at stride 8. A map that nobody reads would
        # leave its norm without gradients, which DDP refuses.
        out_indices=(1, 2, 3),
        # There are no published weights. Give the path of a classifier's
        # checkpoint, or init_cfg=None to train from scratch: see
        # docs/reproduce.md.
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/lavit_t_in1k/epoch_300.pth',
            prefix='backbone.')),
    neck=dict(in_channels=[128, 320, 448], start_level=0))
