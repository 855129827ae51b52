"""Swin-T on ImageNet-1K: mmpretrain's own."""
_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'

train_dataloader = dict(batch_size=128)  # 1024 on 8 GPUs
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
