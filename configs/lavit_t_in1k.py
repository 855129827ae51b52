"""LaViT-T on ImageNet-1K, 300 epochs at 224, batch 1024 = 8 GPUs x 128.

The S and B configs inherit this one. For a moving average of the weights add
``dict(type='EMAHook', momentum=1e-4)`` to ``custom_hooks`` in a child config.
"""
_base_ = [
    '_base_/models/lavit_t.py', '_base_/datasets/imagenet.py',
    '_base_/schedules/imagenet_300e.py',
    'mmpretrain::_base_/default_runtime.py', '_base_/runtime.py'
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
