_base_ = 'mmseg::_base_/models/upernet_r50.py'

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='LaViT',
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(  # None: from scratch
            type='Pretrained',
            checkpoint='work_dirs/lavit_t_in1k/epoch_300.pth',
            prefix='backbone.')),
    decode_head=dict(in_channels=[64, 128, 320, 448], num_classes=150),
    auxiliary_head=dict(in_channels=320, num_classes=150))
