"""PVTv2-B0 as LaViT-N: timm's, by mmpretrain's wrapper. Needs ``pip install timm``."""
_base_ = '../lavit_n_tin100.py'

model = dict(
    _delete_=True,
    type='TimmClassifier',
    model_name='pvt_v2_b0',
    num_classes=100,
    drop_path_rate=0.05,
    loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'))
