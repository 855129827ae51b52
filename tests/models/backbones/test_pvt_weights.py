"""PVTv2's weights in LaViT: what a LaViT with them computes, and what it refuses."""
import re
from pathlib import Path

import pytest
import timm
import torch
from mmdet.models.backbones.pvt import pvt_convert
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from torch import nn

from builders import assert_same, authors_names, logged, randomise, stock_pvt
from mmlavit import LaViT
from mmlavit.analysis.observe import observe_layers
from mmlavit.models.backbones.arch import ARCHS
from mmlavit.models.backbones.pvt_weights import to_lavit_names

ROOT = Path(__file__).parents[3]
SIZES = ((64, 64), (32, 96))
SMALL = dict(
    ARCHS['pvtv2_b0'],
    embed_dims=(8, 16, 40, 64),
    depths=(1, 2, 3, 2),
    num_va_layers=(1, 2, 1, 1))


def all_va(arch: dict, **kwargs) -> LaViT:
    return LaViT(arch, num_va_layers=arch['depths'], **kwargs).double().eval()


def shallow(name: str) -> dict:
    """B0 and B2; the others, which have the same parts, of less depth."""
    arch = ARCHS[name]
    if name not in ('pvtv2_b0', 'pvtv2_b2'):
        arch = dict(arch, depths=(1, 1, 2, 1), num_va_layers=(1, 1, 1, 1))
    return arch


def largest_difference(model, stock, sizes=SIZES) -> float:
    with torch.no_grad():
        pairs = [
            pair for size in sizes for x in [torch.randn(2, 3, *size).double()]
            for pair in zip(model(x), stock(x), strict=True)
        ]
    return max((a - b).abs().max().item() for a, b in pairs)


def timm_b0() -> nn.Module:
    """timm's, with random weights and the eps of mmdet's and LaViT's norms.

    Its norms of patches and keys have torch's 1e-5, as the authors' have.
    """
    model = randomise(timm.create_model('pvt_v2_b0'), .1).double().eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
            module.weight.data += 1
    return model


def timm_maps(model: nn.Module):
    return lambda x: model.forward_intermediates(x, intermediates_only=True)


@pytest.mark.parametrize('name', [n for n in ARCHS if 'pvtv2' in n])
def test_all_va_presets_compute_what_mmdets_class_computes(name):
    arch = shallow(name)
    stock, model = stock_pvt(arch), all_va(arch)
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not missing and not unexpected
    assert largest_difference(model, stock) < 1e-12


def test_the_twin_of_lavit_n_is_a_pvtv2():
    """So its accuracy is that of a PVTv2 of LaViT-N's widths and depths."""
    arch = dict(ARCHS['nano'], mlp_ratios=(4, 4, 4, 4))
    stock, model = stock_pvt(arch), all_va(arch, attn_residual=False)
    model.load_state_dict(stock.state_dict())
    assert largest_difference(model, stock) < 1e-12


def test_the_twin_of_the_cued_digits_network_is_a_pvtv2():
    """Its two stages are the first two of one."""
    backbone = Config.fromfile(ROOT / 'configs/ablation/lavit-cued.py').model.backbone
    arch, sr_ratios = backbone.arch, backbone.sr_ratios
    more = dict(depths=(1, 1), num_heads=(4, 4), mlp_ratios=(4, 4))
    stock = stock_pvt(
        dict(embed_dims=arch.embed_dims,
             **{key: (*arch[key], *values) for key, values in more.items()}),
        sr_ratios=(*sr_ratios, 1, 1), out_indices=(1, ))
    model = all_va(arch, attn_residual=False, sr_ratios=sr_ratios, out_indices=(1, ))
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not missing and all(name[:9] in ('layers.2.', 'layers.3.')
                               for name in unexpected)
    assert largest_difference(model, stock) < 1e-12


def test_the_authors_names_give_the_same():
    stock, model = stock_pvt(SMALL), all_va(SMALL)
    weights = authors_names(stock.state_dict())
    back = pvt_convert(weights)  # mmdet's own reading of the authors' names
    assert back.keys() == stock.state_dict().keys()
    assert all(torch.equal(back[k], x) for k, x in stock.state_dict().items())
    model.load_state_dict(dict(weights, **{'head.weight': torch.ones(3, 64)}))
    assert largest_difference(model, stock) < 1e-12


def test_timms_names_give_the_same_up_to_eps():
    stock, model = timm_b0(), all_va(ARCHS['pvtv2_b0'])
    model.load_state_dict(stock.state_dict())
    assert largest_difference(model, timm_maps(stock)) < 1e-12
    own = timm.create_model('pvt_v2_b0').double().eval()
    own.load_state_dict(stock.state_dict())
    assert 1e-8 < largest_difference(model, timm_maps(own)) < 1e-2
    # So is the model with the authors' eps where they have it.
    for name, module in model.named_modules():
        if name.endswith(('patch_embed.norm', 'reduction.norm')):
            module.eps = 1e-5
    assert largest_difference(model, timm_maps(own)) < 1e-12


@pytest.mark.parametrize('config', [
    dict(type='ImageClassifier',
         backbone=dict(type='TIMMBackbone', model_name='pvt_v2_b0')),
    dict(type='TimmClassifier', model_name='pvt_v2_b0')],
    ids=lambda config: config['type'])
def test_mmpretrains_names_are_timms(config):
    init_default_scope('mmpretrain')  # of an earlier test it may be another
    weights = MODELS.build(config).state_dict()
    bare = timm.create_model('pvt_v2_b0').state_dict()
    expected = {name: next(x for long, x in weights.items() if long.endswith(name))
                for name in bare if not name.startswith('head')}
    naming, converted = to_lavit_names(weights)
    assert naming == 'timm'
    same = to_lavit_names(expected)[1]
    assert converted.keys() == same.keys() == all_va(
        ARCHS['pvtv2_b0']).state_dict().keys()
    assert all(torch.equal(converted[name], x) for name, x in same.items())


@pytest.mark.parametrize('size', [(72, 64), (60, 90), (33, 100)])
def test_at_sizes_that_32_does_not_divide_keys_differ(size):
    """PVTv2 leaves out the tokens that fill no window of keys, LaViT pads them."""
    stock, model = stock_pvt(SMALL), all_va(SMALL)
    model.load_state_dict(stock.state_dict())
    assert largest_difference(model, stock, [size]) > 1e-3
    # Else nothing differs: with every window filled or padded alike.
    for layer in stock.layers:
        for block in layer[1]:
            if block.attn.sr_ratio > 1:
                block.attn.sr.register_forward_pre_hook(pad_to_windows)
    assert largest_difference(model, stock, [size]) < 1e-12


def pad_to_windows(conv: nn.Module, args: tuple) -> tuple:
    x, = args
    bottom, right = (-n % k for n, k in zip(x.shape[2:], conv.kernel_size))
    return (nn.functional.pad(x, (0, right, 0, bottom)), )


@pytest.mark.parametrize('name', ['pvtv2_b0', 'pvtv2_b2'])
def test_less_attention_takes_values_and_says_what_it_drops(name):
    arch = ARCHS[name]
    stock, model = stock_pvt(arch), LaViT(arch).double().eval()
    with logged() as messages:
        missing, unexpected = model.load_state_dict(
            stock.state_dict(), strict=False)
    less = model.less_attention_layers()
    assert less and not unexpected
    assert set(missing) == {f'{layer}.attn.{mix}.weight' for layer in less
                            for mix in ('theta', 'psi')}
    report, = [text for text in messages if 'no Q and K' in text]
    assert all(layer in report for layer in less) and 'those of mmdet' in report
    assert 'stages.0' not in report
    own, theirs = model.state_dict(), stock.state_dict()
    for layer in less:
        _, i, _, j = layer.split('.')
        for kind in ('weight', 'bias'):
            qkv = theirs[f'layers.{i}.1.{j}.attn.attn.in_proj_{kind}']
            assert torch.equal(own[f'{layer}.attn.v.{kind}'], qkv.chunk(3)[2])
    # Their Q may be gone already.
    kept = authors_names(stock.state_dict())
    for name in [f'block{int(i) + 1}.{j}.attn.q.{kind}' for _, i, _, j in
                 (layer.split('.') for layer in less) for kind in ('weight', 'bias')]:
        del kept[name]
    model.load_state_dict(kept, strict=False)
    assert_same(model.state_dict(), own)
    # Up to the first of them nothing is lost.
    x, maps = torch.randn(1, 3, 64, 96).double(), []
    with torch.no_grad(), observe_layers(model, maps.append):
        outs, expected = model(x), stock(x)
    differences = [(a - b).abs().max() for a, b in zip(outs, expected)]
    assert max(differences[:2]) < 1e-12 and min(differences[2:]) > 1e-6
    for before, layer in zip(maps, maps[1:]):
        if layer.kind == 'LA':
            torch.testing.assert_close(layer.region_map(), before.region_map())


def wrap(weights: dict, naming: str) -> dict:
    """The weights as a file in one of the forms there are."""
    if naming == 'mmdet':
        return dict(meta=dict(epoch=1), state_dict={
            **{f'backbone.{name}': x for name, x in weights.items()},
            'neck.lateral_convs.0.conv.weight': torch.ones(1)})
    weights = authors_names(weights)
    if naming == 'authors':
        return weights
    timms = {}
    for name, x in weights.items():
        part, rest = name.split('.', 1)
        kind, stage = part[:-1], int(part[-1]) - 1
        place = dict(block=f'stages.{stage}.blocks', norm=f'stages.{stage}.norm',
                     patch_embed=f'stages.{stage}.downsample' if stage
                     else 'patch_embed')[kind]
        timms[f'{place}.{rest}'.replace('dwconv.dwconv', 'dwconv')] = x
    if naming == 'timm':
        return dict(model=timms, epoch=3)
    return dict(state_dict={
        f'backbone.timm_model.{name}': x for name, x in timms.items()})


@pytest.mark.parametrize('naming', ['mmdet', 'authors', 'timm', 'mmpretrain'])
def test_files_and_downloads_are_converted_on_loading(naming, served):
    """Whatever their naming, bare, under state_dict or under model."""
    folder, address = served
    stock, model = stock_pvt(SMALL), LaViT(SMALL)
    torch.save(wrap(stock.state_dict(), naming), folder / 'pvt.pth')
    model.load_state_dict(stock.state_dict(), strict=False)
    for checkpoint in (f'{address}/pvt.pth', str(folder / 'pvt.pth')):
        loaded = LaViT(SMALL, init_cfg=dict(
            type='Pretrained', checkpoint=checkpoint))
        loaded.init_weights()
        for name, x in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], x), name


def test_a_prefix_may_be_named(tmp_path):
    stock, path = stock_pvt(SMALL), tmp_path / 'pvt.pth'
    torch.save(wrap(stock.state_dict(), 'mmpretrain'), path)
    model = LaViT(SMALL, init_cfg=dict(
        type='Pretrained', checkpoint=str(path), prefix='backbone.'))
    model.init_weights()
    x = stock.state_dict()['layers.3.2.weight'].float()
    assert torch.equal(model.stages[3].norm.weight, x)


@pytest.mark.parametrize('given, arch, message', [
    (SMALL, 'pvtv2_b0', r'patch_embed.conv.weight is \(8, 3, 7, 7\) in the '
     r'checkpoint, \(32, 3, 7, 7\) here'),
    (SMALL, dict(SMALL, depths=(1, 2, 4, 2)),
     r'stages.2.blocks.3 is not in the checkpoint'),
    (SMALL, dict(SMALL, depths=(1, 2, 2, 2)),
     r'stages.2.blocks.2 is in the checkpoint alone'),
    (dict(SMALL, mlp_ratios=(4, 4, 4, 4)), SMALL, r'ffn.fc1.weight is \(32, 8\)'),
], ids=['widths', 'too few layers', 'too many layers', 'FFN'])
def test_weights_of_another_size_are_refused(given, arch, message):
    weights = stock_pvt(given).state_dict()
    with pytest.raises(ValueError, match=message):
        LaViT(arch).load_state_dict(weights, strict=False)


@pytest.mark.parametrize('naming', ['mmdet', 'the authors'])
@pytest.mark.parametrize('x', [None, torch.tensor(1.)], ids=['None', 'a number'])
def test_what_is_no_weight_is_named(naming, x):
    weights = stock_pvt(SMALL).state_dict()
    if naming == 'the authors':
        weights = authors_names(weights)
    name = next(name for name in weights if name.endswith(
        ('in_proj_weight', 'kv.weight')))
    weights[name] = x
    with pytest.raises(ValueError, match=re.escape(f'{name}={x!r}: expected a tensor')):
        LaViT(SMALL).load_state_dict(weights, strict=False)


def test_pvtv2_with_linear_attention_is_refused():
    weights = timm.create_model('pvt_v2_b2_li').state_dict()
    with pytest.raises(ValueError, match=r'reduction.conv.weight is '
                       r'\(64, 64, 1, 1\) in the checkpoint, \(64, 64, 8, 8\)'):
        LaViT('pvtv2_b2').load_state_dict(weights, strict=False)


def test_pvt_of_the_first_version_is_refused():
    weights = {name: x for name, x in authors_names(
        stock_pvt(SMALL).state_dict()).items() if 'dwconv' not in name}
    with pytest.raises(ValueError, match='not the weights of this LaViT'):
        LaViT(SMALL).load_state_dict(weights, strict=False)


def test_less_stages_take_less_weights():
    stock = stock_pvt(SMALL)
    model = all_va(SMALL, out_indices=(0, 1))
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not missing and not unexpected
    assert largest_difference(model, lambda x: stock(x)[:2]) < 1e-12
