"""What holds for all arguments and inputs: a correct forward, or a clear error.

The examples are the same in every run. After a failure `hypothesis` prints the
smallest arguments that fail.
"""
import math
from inspect import signature

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builders import ARCH, randomise
from mmlavit import DiagonalityPreservingLoss, LaViT
from mmlavit.models.layers.attention import TRANSFORMS, VALUE_REDUCTIONS
from mmlavit.models.layers.mixing import MIXINGS
from mmlavit.models.layers.scores import SCORE_PATHS

settings.register_profile('fixed', deadline=None, derandomize=True)
settings.load_profile('fixed')

SIDES = st.integers(1, 700)
MAX_SCORES = 10**6  # entries a head, for time
# Of a wrong type, out of range or in contradiction to others, and at times right.
# None is large, for a model of a million channels is an honest wish.
SMALL = st.integers(-1, 6)
HOSTILE = SMALL | st.lists(SMALL, max_size=5) | st.sampled_from([
    None, True, False, 2.5, -0.1, 0.1, math.nan, math.inf, '', 'la', 'small',
    'LN', b'x', (), {}, ('a', ), (None, ), [[1]], [0.1, 1, 1, 1], {1: 2},
    dict(type='LN'), dict(type='ReLU'), dict(type='Conv2d'), dict(margin=1),
    dict(type='GN', num_groups=3), np.int64(1), np.float32(0.1), np.zeros(2),
    torch.ones(1), object()
])


@st.composite
def valid_arguments(draw) -> dict:
    """Arguments that fit together, of a tiny model."""
    stages = draw(st.integers(1, 4))

    def each(strategy):
        return [draw(strategy) for _ in range(stages)]

    heads, depths = each(st.integers(1, 3)), each(st.integers(1, 2))
    strides = each(st.integers(1, 4))
    residual = draw(st.booleans())
    va_layers = [
        draw(st.integers(int(i == 0), depth)) for i, depth in enumerate(depths)
    ]
    # From the last to the first, for a stage that inherits fixes the one before.
    ratios = [draw(st.integers(1, 3))]
    for i in range(stages - 1, 0, -1):
        inherits = residual or not va_layers[i]
        ratios.append(ratios[-1] * strides[i] if inherits else draw(
            st.integers(1, 4)))
    arch = dict(
        embed_dims=[2 * h * draw(st.integers(1, 2)) for h in heads],
        depths=depths,
        num_heads=heads,
        num_va_layers=va_layers,
        mlp_ratios=each(st.sampled_from([0.5, 1, 2.7])),
        strides=strides,
        patch_sizes=[
            stride + 1 - stride % 2 + 2 * draw(st.integers(0, 1))
            for stride in strides
        ])
    transform = draw(st.sampled_from(TRANSFORMS))
    losses = [None]
    if any(va < depth for va, depth in zip(va_layers, depths)):
        losses += [dict(form='paper')] + [dict()] * (transform == 'token_mix')
    return dict(
        arch=arch,
        sr_ratios=ratios[::-1],
        attn_residual=residual,
        out_indices=sorted(
            {*draw(st.sets(st.integers(0, stages - 1))), stages - 1}),
        in_channels=draw(st.integers(1, 4)),
        pretrain_img_size=draw(st.integers(1, 40)),
        max_query_grid=draw(st.integers(1, 14)),
        max_key_grid=draw(st.none() | st.integers(1, 20)),
        value_reduction=draw(st.sampled_from(VALUE_REDUCTIONS)),
        transform=transform,
        mixing=draw(st.sampled_from(MIXINGS)),
        mixing_rank=draw(st.integers(1, 20)),
        trunk_norm=draw(st.none() | st.booleans()),
        score_path=draw(st.sampled_from(SCORE_PATHS)),
        qkv_bias=draw(st.booleans()),
        norm_cfg=draw(
            st.sampled_from([
                dict(type='LN'),
                dict(type='BN'),
                dict(type='GN', num_groups=2)
            ])),
        act_cfg=draw(
            st.sampled_from([dict(type='GELU'), dict(type='ReLU')])),
        dp_loss=draw(st.sampled_from(losses)),
        frozen_stages=draw(st.integers(-1, stages - 1)),
        with_cp=draw(st.booleans()))


def draw_size(data, model: LaViT) -> tuple:
    """Any size at which the score matrices of the model are not too large."""
    arch, area = model.arch, math.inf
    for i, stage in enumerate(model.stages):
        stride = math.prod(arch['strides'][:i + 1])
        ratio = stage.blocks[0].attn.sr_ratio
        area = min(area, stride**2 * ratio * math.sqrt(MAX_SCORES))
    height = data.draw(SIDES, 'height')
    width = data.draw(
        st.integers(1, max(1, min(700, int(area / height)))), 'width')
    return data.draw(st.permutations([height, width]), 'size')


def check_maps(model: LaViT, outs: tuple, x: torch.Tensor) -> None:
    strides = np.cumprod(model.arch['strides'])
    for i, out in zip(model.out_indices, outs, strict=True):
        assert out.shape == (len(x), model.arch['embed_dims'][i],
                             *(math.ceil(n / strides[i]) for n in x.shape[2:]))
        assert out.dtype == x.dtype and out.isfinite().all()


@settings(max_examples=30)
@given(valid_arguments(), st.data())
def test_valid_arguments_work_and_paths_agree(kwargs, data):
    model = randomise(LaViT(**kwargs)).double().eval()
    x = torch.randn(
        2, kwargs['in_channels'], *draw_size(data, model), dtype=torch.double)
    with torch.no_grad():
        outs = model(x)
        check_maps(model, outs, x)
        for path in SCORE_PATHS:
            other = LaViT(**{**kwargs, 'score_path': path}).double().eval()
            other.load_state_dict(model.state_dict())
            for out, expected in zip(other(x), outs):
                torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
        check_maps(model, model.float()(x.float()), x.float())


@settings(max_examples=30)
@given(valid_arguments(), st.data())
def test_valid_arguments_train(kwargs, data):
    model = randomise(LaViT(**kwargs)).double()
    if kwargs['norm_cfg']['type'] == 'BN':
        model.eval()  # its statistics need more than one pixel
    x = torch.randn(
        2, kwargs['in_channels'], *draw_size(data, model), dtype=torch.double)
    loss = sum(out.square().mean() for out in model(x.requires_grad_()))
    dp = model.dp_loss and model.dp_loss.take()
    if dp is not None:
        assert dp.isfinite()
        loss = loss + dp
    loss.backward()
    for p in (x, *model.parameters()):
        assert p.grad is None or p.grad.isfinite().all()


ARCH_NAMES = ['embed_dims', 'depths', 'num_heads', 'num_va_layers',
              'mlp_ratios', 'patch_sizes', 'strides']


@pytest.mark.parametrize(
    'name', sorted({*signature(LaViT).parameters, *ARCH_NAMES}))
@settings(max_examples=80)
@given(kwargs=valid_arguments(), data=st.data())
def test_any_argument_works_or_is_named(name, kwargs, data):
    holder = kwargs['arch'] if name in ARCH_NAMES else kwargs
    values = holder.get(name)
    if isinstance(values, list) and data.draw(st.booleans(), 'one of them'):
        place = data.draw(st.integers(0, len(values) - 1))
        values[place] = data.draw(
            SMALL | st.sampled_from([None, 2.5, '1', [1]]), name)
    else:
        holder[name] = data.draw(HOSTILE, name)
    try:
        model = LaViT(**kwargs)
    except (TypeError, ValueError) as error:
        assert str(error).startswith('LaViT: ')
        assert 'expected' in str(error)
        return
    model = randomise(model).eval()
    x = torch.randn(2, model.in_channels, 30, 17)
    with torch.no_grad():
        check_maps(model, model(x), x)


@settings(max_examples=15)
@given(SIDES, SIDES)
@example(1, 1)
@example(1, 700)
@example(31, 33)
@example(700, 700)
def test_any_size_works_and_paths_agree(height, width):
    kwargs = dict(arch=ARCH, pretrain_img_size=64)
    model = randomise(LaViT(**kwargs)).double()
    reference = LaViT(score_path='materialised', **kwargs).double()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, height, width, dtype=torch.double)
    with torch.no_grad():
        outs = model(x)
        check_maps(model, outs, x)
        for out, expected in zip(outs, reference(x)):
            torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=100)
@given(
    st.lists(SMALL.map(abs), max_size=5)
    | st.tuples(*[st.sampled_from([0, 1, 2, 3])] * 4),
    st.sampled_from([
        torch.float32, torch.uint8, torch.int64, torch.bool, torch.complex64
    ]))
@example([0, 3, 5, 1], torch.float32)
@example([1, 3, 5, 1], torch.uint8)
def test_any_input_works_or_is_named(shape, dtype):
    model = LaViT(arch=ARCH, pretrain_img_size=64).eval()
    x = torch.zeros(shape, dtype=dtype)
    try:
        check_maps(model, model(x), x)
    except (TypeError, ValueError) as error:
        assert str(error).startswith('LaViT: x.')
        assert len(shape) != 4 or shape[1] != 3 or 0 in shape[2:] or (
            dtype != torch.float32)


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from([
            'form', 'loss_weight', 'symmetry_weight', 'diagonal_weight',
            'margin', 'layers', 'warmup_iters'
        ]), HOSTILE | st.sampled_from(['bounded', 'paper', 'all']),
        max_size=3), st.integers(1, 30))
def test_any_loss_is_within_its_bounds_or_is_named(kwargs, size):
    try:
        loss = DiagonalityPreservingLoss(**kwargs)
    except (TypeError, ValueError) as error:
        assert str(error).startswith('LaViT: dp_loss.')
        assert 'expected' in str(error)
        return
    value = loss.on_scores(3 * torch.randn(2, 3, size, size))
    assert value.isfinite()
    if loss.form == 'bounded':
        most = 2 * loss.symmetry_weight + (1 + loss.margin) * (
            loss.diagonal_weight)
        assert -1e-5 <= value <= most + 1e-5
