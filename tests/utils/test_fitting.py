"""Weights compared with a model's own."""
import pytest
import torch
from torch import nn

from builders import ARCH, stock_pvt
from mmlavit import LaViT
from mmlavit.models.backbones.arch import resolve_arch
from mmlavit.utils.images import image_channels
from mmlavit.utils.weights import load_fitting


class Classifier(nn.Module):
    """A backbone and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        arch = {**ARCH, 'num_va_layers': ARCH['depths'], 'mlp_ratios': (2, 2, 2, 2)}
        self.backbone = LaViT(arch=arch, attn_residual=False, trunk_norm=True)
        self.head = nn.Linear(32, classes)


@pytest.mark.parametrize('classes', [5, 3])
def test_converted_weights_fit_beside_a_head_of_other_classes(classes):
    """PVTv2's by mmdet's names, which the backbone converts."""
    model = Classifier(5)
    arch = resolve_arch(model.backbone.arch, None, (8, 4, 2, 1))
    pvt = stock_pvt(arch).float().state_dict()
    head = nn.Linear(32, classes)
    given = {**{f'backbone.{name}': x for name, x in pvt.items()},
             **{f'head.{name}': x for name, x in head.state_dict().items()}}
    found = load_fitting(model, given)
    own = {f'backbone.{name}' for name in model.backbone.state_dict()}
    assert own <= set(found.fitting)
    assert not found.missing
    assert ('head.weight' in found.fitting) == (classes == 5)
    assert found.sizes == ([] if classes == 5 else [
        'head.weight is (3, 32) in the checkpoint, (5, 32) here',
        'head.bias is (3,) in the checkpoint, (5,) here'])
    expected = LaViT(arch=model.backbone.arch, attn_residual=False)
    expected.load_state_dict(pvt)
    for name, x in model.backbone.state_dict().items():
        assert torch.equal(x, expected.state_dict()[name]), name


@pytest.mark.parametrize('channels', [1, 4])
def test_channels_of_images_are_those_of_the_first_convolution(channels):
    model = nn.Module()
    model.backbone = LaViT(arch=ARCH, in_channels=channels)
    assert image_channels(model) == image_channels(model.backbone) == channels
    assert image_channels(nn.Linear(2, 2)) == 3
