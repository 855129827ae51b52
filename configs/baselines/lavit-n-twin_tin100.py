"""The all-VA twin of LaViT-N: the same network with vanilla attention alone."""
_base_ = '../lavit_n_tin100.py'

model = dict(backbone=dict(num_va_layers=(2, 2, 4, 2), attn_residual=False, dp_loss=None))
