"""A narrow ten-layer LaViT for tools/ablate.py: 16 keys at 32 px, 64 keys at 64 px."""
_base_ = '../lavit_t_in1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='LaViT',
        arch=dict(
            embed_dims=(32, 64, 128),
            depths=(2, 4, 4),
            num_heads=(1, 2, 4),
            num_va_layers=(2, 2, 0),
            mlp_ratios=(2, 2, 2),
            patch_sizes=(3, 3, 3),
            strides=(2, 2, 2)),
        sr_ratios=(4, 2, 1),
        out_indices=(2, )),
    head=dict(in_channels=128))
