"""The models that LaViT is compared with."""
from pathlib import Path

import pytest
import torch

from mmlavit.analysis.complexity import count_macs
from mmlavit.analysis.peers import (LESS_ATTENTION, PEERS, TIMM_PEERS, backbone_config,
                                    build_backbone, expand_groups, published_top1)
from mmlavit.models.layers.mixing import TokenMix

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / 'configs/published.yml'


def test_twins_have_vanilla_attention_alone():
    for arch in ('T', 'S', 'B'):
        model = build_backbone(f'LaViT-{arch}-twin')
        kinds = {type(block.attn).__name__ for stage in model.stages
                 for block in stage.blocks}
        assert kinds == {'VanillaAttention'}
        assert all(stage.downsample is None for stage in model.stages)


def test_unknown_models_are_named():
    for name in ('NoNet', 'mmdet.NoNet(depth=1)', 'two words'):
        with pytest.raises(ValueError, match='expected the path.*LaViT-S') as error:
            backbone_config(name)
        assert str(error.value).startswith(f'{name}: ')


@pytest.mark.parametrize('name, kind', [
    ('retinanet_r50_coco', 'ResNet'), ('retinanet_swin-t_coco', 'SwinTransformer'),
    ('deit-s_in1k', 'VisionTransformer')])
def test_backbones_of_the_toolboxes_are_taken_from_configs(name, kind):
    model = build_backbone(str(ROOT / f'configs/baselines/{name}.py'))
    assert type(model).__name__ == kind


@pytest.mark.parametrize('name, message', [
    ('_base_/models/lavit_t.py', 'default_scope=None: expected a config of a whole'),
    ('baselines/pvtv2-b0_tin100.py', 'expected a config with model.backbone')])
def test_configs_without_a_backbone_of_a_toolbox_are_named(name, message):
    with pytest.raises(ValueError, match=f'{name}: {message}'):
        backbone_config(str(ROOT / 'configs' / name))


@pytest.mark.parametrize('name', ["LaViT('tiny')", "LaViT(**dict(arch='tiny'))"])
def test_arguments_without_a_name_are_refused(name):
    with pytest.raises(ValueError, match=r"expected .* LaViT\(arch='tiny'\)"):
        build_backbone(name)


def test_registered_classes_are_taken_with_their_arguments():
    model = build_backbone('mmdet.ResNet(depth=18, out_indices=(2, ))')
    assert model.depth == 18 and model.out_indices == (2, )
    assert type(build_backbone('mmpretrain.LeNet5')).__name__ == 'LeNet5'


def macs_of(name: str, side: int = 224) -> float:
    return count_macs(build_backbone(name), (side, side))


def test_multiply_adds_of_deit_are_those_of_its_layers():
    """Of each LA layer without the products for Q and K, with Theta's and Psi's."""
    layers, dim, rank, patches = 8, 192, 16, 14 * 14
    tokens, stock = patches + 1, macs_of('DeiT-T')
    for name, mixing in (
        ('LA-DeiT-T', tokens**2 * dim),
        ('LA-DeiT-T-low-rank', 2 * tokens * rank * dim + 2 * patches * rank**2
         + patches**2 * rank)):
        assert stock - macs_of(name) == layers * 2 * (tokens * dim**2 - mixing)


def test_pvt_and_swin_with_less_attention_have_fewer_multiply_adds():
    assert macs_of('LA-PVT-S') < macs_of('PVT-S')
    assert macs_of('LA-Swin-T', 56) < macs_of('Swin-T', 56)


@pytest.mark.parametrize('name', LESS_ATTENTION)
def test_less_attention_is_where_the_name_says(name):
    kinds = {type(module).__name__ for module in build_backbone(name).modules()}
    assert kinds & {'TokenMix', 'LowRankMix'} == (
        {'LowRankMix'} if 'low-rank' in name else
        {'TokenMix'} if 'LA-' in name else set())


def test_every_class_with_less_attention_is_found_by_its_name():
    model = build_backbone('LessAttentionSwinClassifier(la_layers=(6, 7))')
    assert [name for name, module in model.named_modules()
            if isinstance(module, TokenMix)][0] == (
        'stages.2.blocks.2.attn.w_msa.qkv.theta')


@pytest.mark.parametrize('name', TIMM_PEERS)
def test_networks_of_timm_give_maps_and_fused_the_same(name):
    size = 96, 160
    nets = [build_backbone(name, size, fuse=fuse) for fuse in (False, True)]
    images = torch.rand(1, 3, *size)
    for net in nets:
        net.eval()
    with torch.no_grad():
        outs = [net(images) for net in nets]
    for x, y, stride in zip(*outs, (4, 8, 16, 32), strict=True):
        # Swin's and MambaOut's have their channels last.
        assert size[0] // stride in x.shape[1:3] and size[1] // stride in x.shape[2:]
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_fast_vit_is_fused_for_inference():
    plain, fused = (build_backbone('FastViT-SA24', fuse=fuse) for fuse in (False, True))
    assert sum(1 for _ in fused.modules()) < .6 * sum(1 for _ in plain.modules())


def test_names_stand_for_networks_with_published_accuracies():
    names = expand_groups(['LaViT-T', 'today', 'PVT-S'])
    assert names == ['LaViT-T', 'LaViT-S', 'LaViT-S-twin', *TIMM_PEERS, 'PVT-S']
    assert set(names) <= set(PEERS)
    top1 = published_top1(names, PUBLISHED)
    assert set(names) - set(top1) == {'LaViT-S-twin'}
    assert top1['LaViT-S'] == 82.6 and top1['ResNet-50-timm'] == 80.4
    assert all(75 < value < 85 for value in top1.values())
