"""18 layers, 14 VA and 4 LA, for small images: 64 keys at 64 px.

As deep as the network in the paper's figures of attention collapse.
"""
_base_ = './lavit-cued.py'

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=(32, 64, 96),
            depths=(3, 5, 10),
            num_heads=(1, 2, 3),
            num_va_layers=(3, 5, 6),
            mlp_ratios=(2, 2, 2),
            patch_sizes=(7, 3, 3),
            strides=(4, 2, 1)),
        sr_ratios=(2, 1, 1),
        out_indices=(2, )),
    head=dict(in_channels=96))
