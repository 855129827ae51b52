"""Less attention in stock models: the formula, and what must not change."""
import copy
import pickle
import re
from functools import partial
from itertools import combinations
from unittest import mock

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint

from builders import logged, randomise
from mmlavit import add_less_attention
from mmlavit.models.layers.mixing import TokenMix
from mmlavit.plugins import families
from stock_models import CASES, gradients, literally, outputs, total

NAMES = list(CASES)
BOTH = [pytest.param('full', id='full'), pytest.param('low_rank', id='low_rank')]


def image(size: tuple, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(batch, 3, *size, dtype=torch.double)


def converted(name: str, **options):
    """A model with less attention whose mixing matters."""
    case = CASES[name]
    model = case.make()
    plan = add_less_attention(
        model, case.layers, **{**dict(max_base_grid=4), **options})
    mixing = nn.ModuleList(
        module for module in model.modules() if isinstance(module, TokenMix))
    randomise(mixing, 0.5)
    for module in model.modules():
        if type(module).__name__ == 'AttentionDownsample':
            randomise(module, 0.5)
    return model, plan


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1e-6)
        assert (actual[name] - value).abs().max().item() / scale < tolerance, name


@pytest.mark.parametrize('mixing', BOTH)
@pytest.mark.parametrize('name, size', [
    (name, size) for name, case in CASES.items() for size in case.sizes])
def test_layers_equal_the_formula_in_values_and_gradients(name, size, mixing):
    model, _ = converted(name, mixing=mixing)
    reference = literally(model, CASES[name], size)
    x = image(size)
    actual, expected = outputs(model, x), outputs(reference, x)
    assert_same(dict(enumerate(actual)), dict(enumerate(expected)))
    assert_same(gradients(model, x), gradients(reference, x))


@pytest.mark.parametrize('name', NAMES)
def test_without_less_attention_it_is_the_stock_class_bit_for_bit(name):
    case = CASES[name]
    stock, model = case.make(), case.make()
    add_less_attention(model, layers=())
    assert list(model.state_dict()) == list(stock.state_dict())
    for training in (False, True):
        results = []
        for each in (stock, model):
            each.train(training)
            torch.manual_seed(0)
            x = image(case.sizes[0])
            results.append((outputs(each, x), gradients(each, x)))
        (outs, grads), (same, same_grads) = results
        assert all(torch.equal(a, b) for a, b in zip(outs, same, strict=True))
        assert all(torch.equal(grads[n], same_grads[n]) for n in grads)


def what_it_is(model: nn.Module) -> dict:
    """Of each module by name its class, its attributes and how many hooks it has."""
    return {name: (type(module), {
        key: len(value) if key.endswith('hooks') else None
        for key, value in vars(module).items()})
        for name, module in model.named_modules()}


@pytest.mark.parametrize('name', NAMES)
def test_removed_it_is_the_stock_class_again(name):
    case = CASES[name]
    x, model = image(case.sizes[0]), case.make()
    before, weights = outputs(model, x), copy.deepcopy(model.state_dict())
    seen = what_it_is(model)
    plan = add_less_attention(model, case.layers, dp_loss=dict())
    assert [layer.index for layer in plan.layers] == list(case.layers)
    assert list(model.state_dict()) != list(weights)
    model.requires_grad_(False)
    assert plan.remove() is model
    assert what_it_is(model) == seen
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_()  # else torch takes another way, with other rounding
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, x)))
    assert_same(model.state_dict(), weights, 1e-300)


@pytest.mark.parametrize('name', NAMES)
def test_fresh_layers_repeat_their_source(name):
    """Identity mixing: the layer's map is the one it inherits."""
    from mmlavit.analysis import observe_layers
    case = CASES[name]
    model, layers = case.make(), []
    plan = add_less_attention(model, case.layers)
    with observe_layers(model, layers.append), torch.no_grad():
        model(image(case.sizes[0]))
    assert len(layers) == case.count
    for chosen in plan.layers:
        layer = layers[chosen.index]
        assert layer.kind == 'LA' and layer.name == chosen.name
        source = [x for x in layers[:chosen.index]
                  if (x.stage, x.lane) == (layer.stage, layer.lane)]
        if source and layer.scores.inherited is None:
            torch.testing.assert_close(layer.scores.dense(), source[-1].scores.dense())


@pytest.mark.parametrize('name', NAMES)
def test_checkpoints_of_the_stock_class_load(name):
    case = CASES[name]
    stock = case.make()
    weights = {f'backbone.{n}': x for n, x in stock.state_dict().items()}
    model = nn.Module()
    model.backbone, plan = converted(name)
    fresh = case.make()
    add_less_attention(fresh, case.layers, max_base_grid=4)
    randomise(model, .1)
    with logged() as messages:
        load_state_dict(model, weights, strict=False)
    # What is between stages has no counterpart; everything else is the stock's.
    loaded = {n: x for n, x in model.backbone.state_dict().items()
              if 'downsample.depthwise' not in n and 'downsample.mix' not in n}
    for key, value in loaded.items():
        assert torch.equal(value, fresh.state_dict()[key]), key
    dropped = [m for m in messages if 'are dropped' in m]
    assert len(dropped) == 1
    names = dropped[0].split('those of ')[1].split(' are dropped')[0].split(', ')
    for projection, layer in zip(names, plan.layers, strict=True):
        assert projection.startswith(f'{layer.name}.attn.')
    mine = model.backbone.state_dict()
    other, _ = converted(name)
    with logged() as messages:
        other.load_state_dict(mine)  # of its own names: strictly, nothing dropped
    assert not [m for m in messages if 'are dropped' in m]
    assert_same(other.state_dict(), mine, 1e-300)


@pytest.mark.parametrize('name', NAMES)
def test_recomputed_layers_give_the_same_gradients(name):
    """Forwards of two images before the backward pass."""
    model, _ = converted(name, dp_loss=dict(form='bounded'))
    again, _ = converted(name, dp_loss=dict(form='bounded'), with_cp=True)
    sizes = CASES[name].sizes
    results = []
    for each in (model, again):
        each.train()
        outs = outputs(each, image(sizes[0])) + outputs(each, image(sizes[-1], 3))
        (total(outs) + each.dp_loss.take()).backward()
        results.append({n: p.grad for n, p in each.named_parameters()})
    assert_same(*results)


def test_swins_own_with_cp_is_served():
    from mmdet.models.backbones.swin import SwinTransformer
    grads = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        stock = SwinTransformer(
            embed_dims=8, depths=(2, 4), num_heads=(1, 2), strides=(4, 2),
            out_indices=(0, 1), window_size=4, with_cp=with_cp, drop_path_rate=.5)
        plan = add_less_attention(randomise(stock), (4, 5))
        stock.train()
        torch.manual_seed(1)
        grads.append(gradients(stock, image((64, 64)).float()))
        assert plan.remove().stages[0].blocks[0].with_cp is with_cp
    assert_same(*grads, 1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_copies_are_models_of_their_own(name):
    model, _ = converted(name)
    copied = copy.deepcopy(model)
    saved = pickle.loads(pickle.dumps(model))
    x = image(CASES[name].sizes[0])
    expected = outputs(model, x)
    randomise(model, 1.)
    for other in (copied, saved):
        assert_same(dict(enumerate(outputs(other, x))), dict(enumerate(expected)))


@pytest.mark.parametrize('name', NAMES)
def test_scores_are_not_held_after_a_forward(name):
    model, _ = converted(name)
    outputs(model, image(CASES[name].sizes[0]))
    layers = [module for module in model.modules() if hasattr(module, 'role')]
    assert len(layers) == CASES[name].count
    for held in [layers[0].role.handover] + [layer.role.exchange for layer in layers]:
        assert not any(isinstance(x, (torch.Tensor, tuple)) for name, x in
                       vars(held).items() if name != 'grid')
    assert not layers[0].role.handover._handed


@pytest.mark.parametrize('name', NAMES)
def test_recomputed_scores_are_not_held_after_a_backward(name):
    model, _ = converted(name, with_cp=True)
    gradients(model, image(CASES[name].sizes[0]))
    layers = [module for module in model.modules() if hasattr(module, 'role')]
    assert layers and all(layer.role.recomputes for layer in layers)
    for layer in layers:
        assert not any(isinstance(x, (torch.Tensor, tuple))
                       for x in vars(layer.role.exchange).values())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('mixing', BOTH)
@pytest.mark.parametrize('name', NAMES)
def test_autocast_is_close_to_float32(name, mixing, dtype):
    model, _ = converted(name, mixing=mixing)
    model.float()
    x = image(CASES[name].sizes[0]).float()
    expected = outputs(model, x)
    with torch.autocast('cpu', dtype):
        actual = outputs(model, x)
    for a, b in zip(actual, expected):
        error = (a.float() - b).abs().mean() / b.abs().mean()
        assert error < (.1 if dtype is torch.bfloat16 else .02)


@pytest.mark.parametrize('name, backend', [
    ('vit', 'eager'), ('timm', 'aot_eager'), ('pvt', 'eager'), ('swin', 'eager')])
def test_compiles(name, backend):
    model, _ = converted(name)
    x = image(CASES[name].sizes[0])
    expected, grads = outputs(model, x), gradients(model, x)
    model.zero_grad()
    torch._dynamo.reset()
    outs = outputs(torch.compile(model, backend=backend), x)
    assert_same(dict(enumerate(outs)), dict(enumerate(expected)), 1e-8)
    total(outs).backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, grads, 1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_dp_loss_reaches_theta_and_psi_and_observers_change_nothing(name):
    from mmlavit.analysis import observe_layers
    model, plan = converted(name, dp_loss=dict())
    # Strongly mixed maps are flatter than those that they inherit: they lose nothing.
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, TokenMix):
                part.weight.mul_(.2)
    model.train()
    x = image(CASES[name].sizes[0])
    with observe_layers(model, lambda layer: layer.region_map()):
        total(outputs(model, x))
    observed = plan.dp_loss.take()
    total(outputs(model, x))
    loss = plan.dp_loss.take()
    assert loss > 0
    torch.testing.assert_close(observed, loss)
    loss.backward()
    moved = {n for n, p in model.named_parameters()
             if p.grad is not None and p.grad.abs().max() > 0}
    assert moved and all('theta' in n or 'psi' in n for n in moved)
    model.eval()
    outputs(model, x)
    assert plan.dp_loss.take() is None


def test_dp_loss_is_that_of_a_lavit_with_the_same_scores():
    """One stage, two layers, one of them LA: the loss of its scores, by hand."""
    from mmlavit.analysis import observe_layers
    from mmlavit.models.losses.dp_loss import DiagonalityPreservingLoss
    model, plan = converted('vit', dp_loss=dict(form='bounded', margin=.5))
    layers = []
    model.train()
    with observe_layers(model, layers.append):
        outputs(model, image((64, 64)))
    form = DiagonalityPreservingLoss(form='bounded', margin=.5)
    expected = torch.stack([
        form.on_scores(layer.region_scores()) for layer in layers
        if layer.kind == 'LA']).mean()
    torch.testing.assert_close(plan.dp_loss.take(), .1 * expected)


@pytest.mark.parametrize('name, layers, words', [
    ('vit', (0, ), r"\[1, 2, 3, 4\].*layers.0 \(0\) is the first of its stage"),
    ('timm', (0, 1), r'blocks.0 \(0\) is the first of its stage'),
    ('vit', (5, ), 'at most 4'),
    ('pvt', (0, ), 'is the first of the model'),
    ('swin', (3, ), r'\[4, 5, 8\].*stages.1.blocks.1 \(3\) is the first shifted one'),
    ('swin_cls', (2, ), 'the first unshifted one of its stage'),
])
def test_layers_that_cannot_inherit_are_named(name, layers, words):
    with pytest.raises(ValueError, match=words):
        add_less_attention(CASES[name].make(), layers)


def test_a_stage_with_another_grid_of_keys_is_named():
    from mmdet.models.backbones.pvt import PyramidVisionTransformer
    model = PyramidVisionTransformer(
        pretrain_img_size=64, embed_dims=6, num_layers=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1], sr_ratios=[4, 4, 2, 1])
    with pytest.raises(ValueError, match=r'layers.1.1.1 \(1\).*keys of the stage before'):
        add_less_attention(model, (1, ))
    add_less_attention(model, (2, 3))


def test_ragged_grids_are_named():
    model, _ = converted('pvt')
    with pytest.raises(ValueError, match=r'layers.0.1.1.*\(20, 16\).*multiples of '
                       'sr_ratio=8.*multiple of 32'):
        outputs(model, image((80, 64)))


def test_maps_smaller_than_a_window_are_named_or_padded():
    """mmpretrain's Swin stops there with a bare AssertionError."""
    model, _ = converted('swin_cls')
    x = image((48, 64))
    with pytest.raises(ValueError, match=r'stages.2.blocks.0=\(3, 4\): expected a map '
                       r'of at least a window, \(4, 4\).*pad_small_map=True'):
        outputs(model, x)
    for module in model.modules():
        if hasattr(module, 'pad_small_map'):
            module.pad_small_map = True
    reference = literally(model, CASES['swin_cls'], (48, 64))
    assert_same(dict(enumerate(outputs(model, x))),
                dict(enumerate(outputs(reference, x))))


def test_a_window_is_the_base_grid_whatever_its_size():
    from mmdet.models.backbones.swin import SwinTransformer
    model = SwinTransformer(embed_dims=8, depths=(3, ), num_heads=(1, ), strides=(4, ),
                            out_indices=(0, ), window_size=16)
    add_less_attention(model, (2, ), max_base_grid=4)
    mixing = [module for module in model.modules() if isinstance(module, TokenMix)]
    assert [part.base_grid for part in mixing] == [(16, 16)] * 2


def test_unknown_models_are_named():
    with pytest.raises(TypeError, match='model=None: expected a model'):
        add_less_attention(None, (1, ))
    for model in (nn.Linear(2, 2), nn.Sequential(CASES['vit'].make(),
                                                 CASES['vit'].make())):
        with pytest.raises(ValueError, match='one model of these classes.*timm'):
            add_less_attention(model, (1, ))
    model = CASES['vit'].make()
    add_less_attention(model, (1, ))
    with pytest.raises(ValueError, match=r'plan.remove\(\) first'):
        add_less_attention(model, (2, ))
    from mmpretrain.models import BEiTViT
    with pytest.raises(ValueError, match='one model of these classes'):
        add_less_attention(BEiTViT(dict(embed_dims=8, num_layers=2, num_heads=2,
                                        feedforward_channels=8), img_size=32), (1, ))


def test_of_a_whole_model_the_plan_is_of_it_all():
    """With its names, and a model that is as it was where the conversion fails."""
    from mmpretrain.models import ImageClassifier

    class Adapted(nn.Linear):
        """As of LoRA; what it does with Q and K is not known."""

    model = ImageClassifier(dict(
        type='VisionTransformer', arch=dict(
            embed_dims=8, num_layers=3, num_heads=2, feedforward_channels=8),
        img_size=32))
    modules = dict(model.named_modules())
    plan = add_less_attention(model, (1, ))
    assert [layer.name for layer in plan.layers] == ['backbone.layers.1']
    assert type(modules['backbone.layers.1']).__module__.startswith('mmlavit')
    assert plan.remove() is model
    model.backbone.layers[2].attn.qkv = Adapted(8, 24)
    seen = what_it_is(model)
    with pytest.raises(ValueError, match='backbone.layers.2.attn.qkv=.Adapted'):
        add_less_attention(model, (1, ))
    assert what_it_is(model) == seen


def test_a_conversion_that_fails_leaves_the_model_as_it_was():
    model = CASES['vit'].make()
    seen = what_it_is(model)
    with mock.patch.object(families, 'LessQKV', side_effect=MemoryError), \
            pytest.raises(MemoryError):
        add_less_attention(model, (1, 2))
    assert what_it_is(model) == seen
    add_less_attention(model, (1, 2))


def test_normed_queries_and_dropped_patches_are_refused():
    from timm.models.vision_transformer import VisionTransformer
    small = dict(img_size=32, embed_dim=8, depth=2, num_heads=2)
    for options, words in ((dict(qk_norm=True), 'q_norm'),
                           (dict(patch_drop_rate=.5), 'patch_drop_rate=0')):
        with pytest.raises(ValueError, match=words):
            add_less_attention(VisionTransformer(**small, **options), (1, ))


@pytest.mark.parametrize('layers', [(1, 2, 4), (1, ), (1, 3)])
def test_layers_recomputed_by_timm_are_refused_with_the_remedy(layers):
    model = CASES['timm'].make()
    add_less_attention(model, layers)
    model.set_grad_checkpointing()
    model.train()
    loss = total(outputs(model, image((64, 64))))
    with pytest.raises(RuntimeError, match='with_cp=True of mmlavit'):
        loss.backward()


def recompute_by_mmengine(model: nn.Module, names: list) -> None:
    from mmengine.runner import turn_on_activation_checkpointing
    turn_on_activation_checkpointing(model, names)


def recompute_by_torch(model: nn.Module, names: list) -> None:
    for name in names:
        layer = model.get_submodule(name)
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@pytest.mark.parametrize('recompute, accepted', [
    (recompute_by_mmengine, [(4, )]),
    # Whose recomputation has the scores of the layer that needs them.
    (recompute_by_torch, [(0, ), (2, ), (0, 2), (4, ), (0, 4), (2, 4), (0, 2, 4)])])
def test_layers_recomputed_by_others_are_right_or_refused(recompute, accepted):
    """Each choice of layers; those with less attention, 1 and 3, read 0 and 2."""
    model, found = CASES['vit'].make(), []
    add_less_attention(model, (1, 3))
    model.train()
    x = image((64, 64))
    expected = gradients(model, x)
    for choice in (c for n in range(1, 6) for c in combinations(range(5), n)):
        other = copy.deepcopy(model)
        recompute(other, [f'layers.{i}' for i in choice])
        try:
            assert_same(gradients(other, x), expected)
            found.append(choice)
        except RuntimeError as error:
            assert 'use with_cp=True of mmlavit instead' in str(error)
    assert sorted(found) == sorted(accepted)


@pytest.mark.parametrize('name', ['vit', 'timm', 'pvt', 'swin'])
def test_auto_chooses_the_deepest_similar_layers(name):
    case = CASES[name]
    model, x = case.make(), image(case.sizes[0])
    from mmlavit.plugins.choose import layer_similarities
    next(module for module in model.modules() if not list(module.children())).train()
    modes = [module.training for module in model.modules()]
    found = layer_similarities(model, x)
    assert [module.training for module in model.modules()] == modes
    assert all(type(module).__module__.split('.')[0] != 'mmlavit'
               for module in model.modules())
    bound = sorted(found.values())[-2]
    plan = add_less_attention(model, images=x, min_similarity=bound)
    wanted = sorted(i for i, value in found.items() if value >= bound)
    assert [layer.index for layer in plan.layers] == wanted and len(wanted) == 2
    for layer in plan.layers:
        assert layer.similarity == found[layer.index]
        assert f'{layer.name}: its map is {layer.similarity:.3f}' in plan.report
    assert 'parameters: ' in plan.report and 'multiply-adds at 64 x 64' in plan.report
    plan.remove()
    plan = add_less_attention(model, images=x, min_similarity=bound, num_layers=1)
    assert [layer.index for layer in plan.layers] == wanted[-1:]
    plan.remove()
    with pytest.raises(ValueError, match='at most .*, the largest similarity') as error:
        add_less_attention(model, images=x, min_similarity=1.01)
    asked = float(re.search('at most (.*), the', str(error.value))[1])
    plan = add_less_attention(model, images=x, min_similarity=asked)
    assert plan.layers
    plan.remove()
    with pytest.raises(TypeError, match="images for layers='auto'"):
        add_less_attention(model)


def test_auto_needs_a_layer_with_another_before_it():
    from mmdet.models.backbones.pvt import PyramidVisionTransformer
    model = PyramidVisionTransformer(
        pretrain_img_size=64, embed_dims=6, num_layers=[1, 1], num_heads=[1, 1],
        num_stages=2, patch_sizes=[4, 2], strides=[4, 2], paddings=[0, 0],
        sr_ratios=[2, 1], mlp_ratios=[1, 1], out_indices=(1, ))
    with pytest.raises(ValueError, match="layers='auto': expected a model with a layer"):
        add_less_attention(model, images=image((64, 64)).float())


def test_similarity_is_high_where_a_layer_repeats_the_one_before():
    """A layer with the Q and K of the layer before, on the same tokens."""
    from mmlavit.plugins.choose import layer_similarities
    model = CASES['vit'].make()
    for part in (model.layers[2].attn.proj, model.layers[2].ffn.layers[1]):
        nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)
    model.layers[3].ln1.load_state_dict(model.layers[2].ln1.state_dict())
    model.layers[3].attn.qkv.load_state_dict(model.layers[2].attn.qkv.state_dict())
    found = layer_similarities(model, image((64, 64)))
    assert max(found, key=found.get) == 3
    assert found[3] == pytest.approx(1) and found[4] < .99
