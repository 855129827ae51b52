"""Semantic FPN with LaViT-T on ADE20K, 80k, 512 crop, batch 16 = 8 GPUs x 2.

The S and B configs inherit this one. For masks of your own see
``reduce_zero_label`` in ``_base_/datasets/ade20k.py``.
"""
_base_ = [
    '_base_/models/semantic_fpn_lavit_t.py', '_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py', '_base_/schedules/ade20k_80k.py',
    '_base_/runtime.py'
]
