"""A classifier. Label smoothing, mixup and cutmix are the base's."""
_base_ = 'mmpretrain::_base_/models/van/van_tiny.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='LaViT',
        arch='tiny',
        out_indices=(3, ),
        drop_path_rate=0.1),
    head=dict(in_channels=448))
