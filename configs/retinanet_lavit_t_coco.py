"""RetinaNet with LaViT-T on COCO, 1x (12 epochs), batch 16 = 8 GPUs x 2.

The S and B configs inherit this one. Training begins from a classifier's checkpoint:
see ``init_cfg`` in ``_base_/models/retinanet_lavit_t.py``.
"""
_base_ = [
    '_base_/models/retinanet_lavit_t.py',
    'mmdet::_base_/datasets/coco_detection.py', '_base_/schedules/coco_1x.py',
    'mmdet::_base_/default_runtime.py', '_base_/runtime.py'
]
