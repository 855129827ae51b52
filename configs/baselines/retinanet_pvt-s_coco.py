"""RetinaNet with PVT-S: mmdet's own, with LaViT's schedule (1x, AdamW 1e-4)."""
_base_ = 'mmdet::pvt/retinanet_pvt-s_fpn_1x_coco.py'

optim_wrapper = dict(
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.))
