"""A small LaViT for the cued digits (tools/make_cued_digits.py): 64 keys at 64 px.

One VA layer, which sees colours, and six LA layers behind it, which see digits.
"""
_base_ = '../lavit_t_in1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='LaViT',
        arch=dict(
            embed_dims=(32, 64),
            depths=(1, 6),
            num_heads=(1, 2),
            num_va_layers=(1, 0),
            mlp_ratios=(2, 2),
            patch_sizes=(7, 3),
            strides=(4, 2)),
        sr_ratios=(2, 1),
        out_indices=(1, )),
    head=dict(in_channels=64))
