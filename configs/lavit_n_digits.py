"""LaViT-N on single scanned digits, at 64 px; see tools/make_digits.py for the data.

Begins from LaViT-N's weights and trains on the CPU in a minute or two. From scratch:
``--cfg-options model.backbone.init_cfg=None``.
"""
_base_ = './lavit_n_tin100.py'

num_epochs = 20
model = dict(
    backbone=dict(
        drop_path_rate=0.,
        dp_loss=None,  # the base has it
        init_cfg=dict(
            type='Pretrained',
            checkpoint='{{ fileDirname }}/../checkpoints/lavit_n_tin100-e3a49569.pth',
            prefix='backbone.')),
    head=dict(num_classes=10))
data_preprocessor = dict(num_classes=10)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=64, padding=4),  # no mirrored digits
    dict(type='PackInputs')
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    dataset=dict(data_root='data/digits/classes/train', pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=1,
    dataset=dict(data_root='data/digits/classes/val', pipeline=test_pipeline))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=num_epochs, val_interval=5)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        by_epoch=True,
        convert_to_iter_based=True)
]
auto_scale_lr = dict(base_batch_size=32)
custom_hooks = [dict(type='InvalidLossHook')]
randomness = dict(seed=0)
