"""The registered backbones with less attention, as configs build them."""
import importlib
import itertools
import re

import pytest
import torch
import torch.multiprocessing as mp
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from builders import (authors_names, check_mean, leave_process_group, logged,
                      randomise)
from mmlavit import DiagonalityPreservingLoss

VIT = dict(embed_dims=12, num_layers=4, num_heads=3, feedforward_channels=24)
PVT = dict(pretrain_img_size=64, embed_dims=6, num_layers=[1, 1, 3, 2],
           num_heads=[1, 2, 3, 4], mlp_ratios=[2, 2, 2, 2], drop_path_rate=0.)
SWIN = dict(embed_dims=8, depths=(2, 4), num_heads=(1, 2))
# The module, the class's arguments, those of less attention, the stock class's name.
CLASSES = {
    'ViT': ('la_vit', dict(arch=VIT, img_size=64, out_type='featmap'),
            dict(first_la_layer=2), 'mmpretrain.VisionTransformer'),
    'PVT': ('la_pvt', PVT, dict(num_va_layers=(1, 1, 2, 0)),
            'mmdet.PyramidVisionTransformer'),
    'Swin': ('la_swin', dict(SWIN, window_size=4, strides=(4, 2), out_indices=(0, 1),
                             drop_path_rate=0.),
             dict(la_layers=(4, 5)), 'mmdet.SwinTransformer'),
    'SwinClassifier': ('la_swin_cls', dict(arch=SWIN, window_size=4, out_indices=(0, 1),
                                           drop_path_rate=0.),
                       dict(la_layers=(4, 5)), 'mmpretrain.SwinTransformer'),
}


def build(name: str, less: bool = True, **kwargs) -> nn.Module:
    module, arguments, options, _ = CLASSES[name]
    importlib.import_module(f'mmlavit.models.backbones.{module}')
    torch.manual_seed(0)
    return MODELS.build({
        'type': f'LessAttention{name}', **arguments, **(options if less else {}), **kwargs})


def stock(name: str, **kwargs) -> nn.Module:
    _, arguments, _, cls = CLASSES[name]
    toolbox = importlib.import_module(f'{cls.split(".")[0]}.models')
    return getattr(toolbox, cls.split('.')[1])(**arguments, **kwargs)


def total(outs) -> torch.Tensor:
    return sum((out.square() * torch.linspace(0, 1, out[0].numel()).view_as(
        out[:1]).to(out)).sum() for out in outs)


@pytest.mark.parametrize('name', CLASSES)
def test_without_less_attention_it_is_the_stock_class(name):
    ours, theirs = build(name, less=False), stock(name)
    weights = randomise(theirs).state_dict()
    assert list(ours.state_dict()) == list(weights)
    ours.load_state_dict(weights)
    for training in (False, True):
        ours.train(training), theirs.train(training)
        x = torch.randn(2, 3, 64, 64)
        assert all(torch.equal(a, b) for a, b in zip(ours(x), theirs(x), strict=True))


@pytest.mark.parametrize('name', CLASSES)
def test_every_parameter_is_used_and_begins_to_move(name):
    model = build(name, dp_loss=dict(form='bounded'))
    model.init_weights()
    model.train()
    (total(model(torch.randn(2, 3, 64, 64))) + model.dp_loss.take()).backward()
    new = {n: p for n, p in model.named_parameters() if 'theta' in n or 'psi' in n}
    assert len(new) >= 4 and all(p.grad.abs().max() > 0 for p in new.values())
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(p, torch.zeros_like(p)) for p in new.values())


@pytest.mark.parametrize('name, frozen', [('ViT', 3), ('Swin', 1), ('SwinClassifier', 0)])
def test_frozen_stages_are_the_stocks(name, frozen):
    ours, theirs = build(name, frozen_stages=frozen), stock(name, frozen_stages=frozen)
    ours.train(), theirs.train()
    train = {n for n, p in theirs.named_parameters() if p.requires_grad}
    for n, p in ours.named_parameters():
        before = n.replace('qkv.v.', 'qkv.').replace('qkv.theta.', 'qkv.').replace(
            'qkv.psi.', 'qkv.')
        assert p.requires_grad == (before in train), n
    assert 0 < sum(not p.requires_grad for p in ours.parameters())


# The models that two processes train.
MIXINGS = dict(full=dict(), low_rank=dict(
    mixing='low_rank', mixing_rank=3, dp_loss=dict(form='bounded')))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Means over the images, so that that of all is the mean of those of two halves."""
    losses = [total(model(x)) / len(x)]
    losses += [part.take() for part in model.modules()
               if isinstance(part, DiagonalityPreservingLoss)]
    return sum(losses)


def ddp_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    x = torch.load(f'{folder}/x.pt')[2 * rank:2 * rank + 2]
    for name, mixing in itertools.product(CLASSES, MIXINGS):
        model = DistributedDataParallel(
            randomise(build(name, **MIXINGS[mixing])).double())
        for _ in range(2):  # DDP reports unused parameters at the second pass
            model.zero_grad()
            loss_of(model, x).backward()
        if rank == 0:
            torch.save([p.grad for p in model.parameters()],
                       f'{folder}/{name}_{mixing}.pt')
    del model
    leave_process_group()


def test_weights_of_the_stock_class_fit_a_stage_that_begins_with_less_attention():
    """Whose downsampling the stock class has not: it begins as it was built."""
    model = build('PVT')
    downsample = model.layers[3][1][1].attn.attn.downsample
    initial = {name: x.clone() for name, x in downsample.state_dict().items()}
    randomise(model)
    keys = model.load_state_dict(stock('PVT').state_dict())
    assert not keys.missing_keys
    assert all(torch.equal(x, initial[name])
               for name, x in downsample.state_dict().items())


def test_the_dp_loss_is_on_layers_whose_scores_nobody_takes():
    model = build('PVT', num_va_layers=(1, 1, 3, 1),
                  dp_loss=dict(form='bounded', layers='all')).train()
    model(torch.randn(1, 3, 64, 64))
    value = model.dp_loss.take()
    assert value > 0 and value.requires_grad


def test_a_residual_that_cannot_be_is_named():
    with pytest.raises(ValueError, match=r'attn_residual=True: expected.* layers\.1\.'):
        build('PVT', attn_residual=True, num_va_layers=(1, 1, 2, 1),
              sr_ratios=[4, 4, 2, 1])


def test_two_processes_give_the_gradients_of_one(tmp_path, free_port):
    x = torch.randn(4, 3, 64, 64, dtype=torch.double)
    torch.save(x, tmp_path / 'x.pt')
    mp.spawn(ddp_worker, (free_port, str(tmp_path)), nprocs=2)
    for name, mixing in itertools.product(CLASSES, MIXINGS):
        model = randomise(build(name, **MIXINGS[mixing])).double()
        loss_of(model, x).backward()
        grads = torch.load(tmp_path / f'{name}_{mixing}.pt')
        for (n, p), grad in zip(model.named_parameters(), grads, strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=1e-8, atol=1e-10, msg=n)


def swins_authors_names(weights: dict) -> dict:
    """mmdet's Swin weights by the names, and in the orders, of the authors' release."""
    out = {'head.bias': torch.ones(1)}
    for name, x in weights.items():
        if re.match(r'norm\d', name):
            continue  # of maps; the authors' network has one, of the last
        if '.downsample.' in name:
            # mmdet's channels lie (channel, y, x), the authors' (x, y, channel).
            x = x.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
        for ours, theirs in (('stages.', 'layers.'), ('w_msa.', ''),
                             ('projection', 'proj'), ('ffn.layers.0.0', 'mlp.fc1'),
                             ('ffn.layers.1', 'mlp.fc2')):
            name = name.replace(ours, theirs)
        out[name] = x
    return out


@pytest.mark.parametrize('name, names, options', [
    ('PVT', authors_names, {}),
    ('Swin', swins_authors_names, dict(convert_weights=True))])
def test_weights_by_their_authors_names_load(name, names, options, tmp_path):
    """As configs name them. No release was at hand: ours is made by its names."""
    weights = randomise(stock(name)).state_dict()
    path = tmp_path / 'release.pth'
    torch.save(names(weights), path)
    model = build(name, **options, init_cfg=ConfigDict(
        type='Pretrained', checkpoint=str(path)))
    with logged() as messages:
        model.init_weights()
    assert any('Less attention has no Q and K: those of' in x for x in messages)
    mine = model.state_dict()
    for key, x in weights.items():
        if key not in mine:  # V's part of Q, K and V
            key = key.replace('qkv.', 'qkv.v.').replace('in_proj_', 'v.')
            x = x.chunk(3)[2]
        assert torch.equal(mine[key], x) or re.match(r'norm\d', key), key
    new = [x for key, x in mine.items() if 'theta' in key or 'psi' in key]
    assert new and not any(x.any() for x in new)


def test_old_names_of_mmpretrains_swin_load():
    weights = randomise(stock('SwinClassifier')).state_dict()
    old = {n.replace('norm1.', 'norm.') if n.startswith('norm1') else n: x
           for n, x in weights.items()}
    old['stages.0.blocks.1.attn.attn_mask'] = torch.zeros(1)
    model = build('SwinClassifier')
    model.load_state_dict(old)
    assert torch.equal(model.norm1.weight, weights['norm1.weight'])


def test_residual_scores_of_the_stage_before_are_added():
    """With a mixing of heads of zero they change nothing, else something."""
    plain, residual = build('PVT'), build('PVT', attn_residual=True)
    weights = randomise(residual).state_dict()
    plain.load_state_dict(weights, strict=False)
    assert weights.keys() - plain.state_dict().keys() == {
        f'layers.{i}.1.1.attn.attn.downsample.{n}' for i in (1, 2)
        for n in ('depthwise', 'mix')}
    plain.double().eval(), residual.double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    before = plain(x)
    assert (residual(x)[0] - before[0]).abs().max() < 1e-12
    assert (residual(x)[1] - before[1]).abs().max() > 1e-7
    for i in (1, 2):
        nn.init.zeros_(residual.layers[i][1][1].attn.attn.downsample.mix)
    for a, b in zip(residual(x), before):
        assert (a - b).abs().max() < 1e-12


def test_dropout_of_pvts_maps_is_right_on_average():
    model = randomise(build('PVT', attn_drop_rate=.3), .5).double().eval()
    attn, seen, x = model.layers[2][1][3].attn.attn, [], torch.randn(1, 3, 64, 64).double()
    assert type(attn).__name__ == 'LessAttention'
    attn.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        model(x)
        attn.train()
        for _ in range(200):
            model(x)
    check_mean(torch.stack(seen[1:]), seen[0])


@pytest.mark.parametrize('name, kwargs, error, words', [
    ('ViT', dict(first_la_layer=0), ValueError, 'first_la_layer=0: expected an integer'),
    ('ViT', dict(first_la_layer=1, la_layers=(2, )), ValueError, 'la_layers=.2.*beside'),
    ('ViT', dict(la_layers=(9, )), ValueError, 'la_layers=9.*at most 3'),
    ('ViT', dict(mixing='half'), ValueError, "mixing='half': expected one of"),
    ('ViT', dict(la_layers='2'), TypeError, 'a sequence of integers'),
    ('ViT', dict(dp_loss=dict()), ValueError, 'a backbone with less-attention layers'),
    ('PVT', dict(la_layers=5), TypeError, 'la_layers=5: expected a sequence'),
    ('PVT', dict(la_layers='2', attn_residual=True), TypeError, "la_layers='2'"),
    ('PVT', dict(num_va_layers=(1, 1, 4, 1)), ValueError, 'at most num_layers'),
    ('PVT', dict(num_va_layers=(0, 1, 1, 1)), ValueError,
     r'num_va_layers=\(0, 1, 1, 1\).*at least 1 in the first'),
    ('PVT', dict(num_va_layers=(1, 1, 3, 1), la_layers=(3, )), ValueError, 'None beside'),
    ('Swin', dict(la_layers=(1, )), ValueError, r'la_layers=\[1\].*\[4, 5\].*the first shifted one'),
])
def test_bad_arguments_are_named(name, kwargs, error, words):
    with pytest.raises(error, match=words):
        build(name, less=False, **kwargs)
