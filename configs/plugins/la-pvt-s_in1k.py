"""PVT-S with less attention at the end of stages 3 and 4, on ImageNet-1K (our experiment)."""
_base_ = '../lavit_t_in1k.py'
custom_imports = dict(
    imports=['mmlavit', 'mmlavit.models.backbones.la_pvt'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='LessAttentionPVT',
        num_layers=[3, 4, 6, 3],
        num_va_layers=(3, 4, 3, 1),
        out_indices=(3, )),
    head=dict(in_channels=512))
