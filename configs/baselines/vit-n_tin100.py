"""A narrow ViT on 100 classes of Tiny-ImageNet: 64 tokens of 8 x 8 pixels.

Small enough for a CPU. It has no convolution that could take over what attention does.
"""
_base_ = [
    '../_base_/datasets/tiny_imagenet100.py',
    'mmpretrain::_base_/default_runtime.py'
]

max_epochs = 10
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(
            embed_dims=96,
            num_layers=12,
            num_heads=3,
            feedforward_channels=192),
        img_size=64,
        patch_size=8),
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=100,
        in_channels=96,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0)))
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-3, by_epoch=True, end=1,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=1,
        end=max_epochs, convert_to_iter_based=True)
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=128)
