"""DeiT-T with less attention from layer 4 of 12 on, on ImageNet-1K (our experiment)."""
_base_ = './la-deit-s_in1k.py'

model = dict(backbone=dict(arch='deit-tiny'), head=dict(in_channels=192))
