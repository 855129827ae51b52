_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4),
    constructor='MergedGroupsConstructor',
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.))
