"""PVTv2-B2 on ImageNet-1K, as LaViT: timm's, by mmpretrain's wrapper.

Needs ``pip install timm``. (mmdet's class returns lists, which mmpretrain's necks
refuse.)
"""
_base_ = '../lavit_t_in1k.py'

model = dict(
    _delete_=True,
    type='TimmClassifier',
    model_name='pvt_v2_b2',
    num_classes=1000,
    drop_path_rate=0.1,
    loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    train_cfg=dict(augments=[
        dict(type='Mixup', alpha=0.8),
        dict(type='CutMix', alpha=1.0)
    ]))
