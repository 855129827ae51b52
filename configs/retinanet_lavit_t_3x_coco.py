"""RetinaNet with LaViT-T on COCO, 3x (36 epochs) with multi-scale training."""
_base_ = [
    '_base_/models/retinanet_lavit_t.py', '_base_/datasets/coco_multiscale.py',
    '_base_/schedules/coco_3x.py', 'mmdet::_base_/default_runtime.py',
    '_base_/runtime.py'
]
