"""Crops of 512, batch 16 = 8 GPUs x 2.

ADE20K's masks number 150 classes from 1 and call the rest 0; the base loads them
with ``reduce_zero_label=True``, which makes 0 the ignored label 255 and moves the
classes to 0..149. For masks of your own whose classes begin at 0 set it to False,
in the data sets and in every ``LoadAnnotations``, or the first class is ignored.
"""
_base_ = 'mmseg::_base_/datasets/ade20k.py'

train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(enable=False, base_batch_size=16)
