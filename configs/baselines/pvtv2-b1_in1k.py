"""PVTv2-B1 on ImageNet-1K, as LaViT; see the B2 config."""
_base_ = './pvtv2-b2_in1k.py'

model = dict(model_name='pvt_v2_b1')
