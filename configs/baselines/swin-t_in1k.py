"""Swin-T on ImageNet-1K: mmpretrain's own."""
_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'
