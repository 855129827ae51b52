"""Theta and Psi fitted to a teacher's attention."""
import copy

import cv2
import numpy as np
import pytest
import torch

from builders import randomise, stock_pvt
from mmlavit import LaViT
from mmlavit.checkpoints.fit import (MEAN, STD, divergence, examples, fit,
                                     make_teacher, read_images)
from mmlavit.models.backbones.arch import PVTV2

ARCH = dict(
    PVTV2,
    embed_dims=(8, 16),
    num_heads=(1, 2),
    depths=(1, 3),
    num_va_layers=(1, 1))
OPTIONS = dict(
    arch=ARCH, pretrain_img_size=32, sr_ratios=(2, 1), out_indices=(0, 1))


def batches(count: int = 6) -> list:
    return list(torch.randn(4 * count, 3, 32, 32).split(4))


@pytest.fixture
def mixing() -> tuple:
    """A student of fresh mixing, and a teacher whose layers do mix."""
    student = randomise(LaViT(**OPTIONS), 1.).eval()  # attention is no mean
    for name in student.less_attention_layers():
        attn = student.get_submodule(f'{name}.attn')
        torch.nn.init.zeros_(attn.theta.weight)
        torch.nn.init.zeros_(attn.psi.weight)
    teacher = copy.deepcopy(student)
    for name in teacher.less_attention_layers():
        attn = teacher.get_submodule(f'{name}.attn')
        torch.nn.init.normal_(attn.theta.weight)
        torch.nn.init.normal_(attn.psi.weight)
    return student, teacher


def test_mixing_that_a_teacher_does_is_recovered(mixing):
    student, teacher = mixing
    before = {name: x.clone() for name, x in student.state_dict().items()}
    found = fit(student, teacher, batches(), steps=300)
    assert [layer.name for layer in found] == student.less_attention_layers()
    assert all(layer.before > .01 for layer in found)
    assert all(layer.after < .05 * layer.before for layer in found), found
    after = student.state_dict()
    changed = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert changed == {f'{layer.name}.attn.{mix}.weight' for layer in found
                       for mix in ('theta', 'psi')}
    assert all(p.grad is None for p in student.parameters())


def test_the_error_is_that_of_the_network_as_it_runs(mixing):
    """KL of the maps by torch's own loss, from hooks on both."""
    from mmlavit.analysis.observe import observe_layers
    student, teacher = randomise(mixing[0], .3), mixing[1]
    name, images = 'stages.1.blocks.2', batches(1)
    maps = {}
    with torch.no_grad():
        for key, model in (('own', student), ('theirs', teacher)):
            with observe_layers(model, lambda layer: maps.setdefault(
                    (key, layer.name), layer.attention_of(range(layer.scores.dense().shape[2])))):
                model(images[0])
    own, theirs = (maps[key, name] for key in ('own', 'theirs'))
    expected = torch.nn.functional.kl_div(
        own.log(), theirs, reduction='sum') / own[..., 0].numel()
    example, = examples(student, teacher, name, images)
    attn = student.get_submodule(f'{name}.attn')
    torch.testing.assert_close(divergence(attn, example), expected)


def test_a_converted_network_comes_nearer_to_the_stock_one():
    stock = stock_pvt(dict(ARCH, embed_dims=(8, 16, 40, 64), depths=(1, 1, 3, 2),
                           num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4)))
    weights = stock.float().state_dict()
    student = LaViT(dict(
        PVTV2, embed_dims=(8, 16, 40, 64), depths=(1, 1, 3, 2),
        num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), num_va_layers=(1, 1, 1, 1)),
        pretrain_img_size=64).eval()
    student.load_state_dict(weights, strict=False)
    teacher = make_teacher(weights, student)
    torch.manual_seed(0)
    images = list(torch.randn(24, 3, 64, 64).split(4))
    with torch.no_grad():
        for ours, theirs in zip(teacher(images[0]), stock(images[0])):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    found = fit(student, teacher, images, steps=100)
    assert len(found) == 3
    assert all(layer.after <= layer.before for layer in found), found
    assert found[0].after < .7 * found[0].before
    # With too few images to tell, what does not help is not kept.
    assert [layer.after < layer.before for layer in found] == [
        bool(student.get_submodule(f'{layer.name}.attn').psi.weight.any())
        for layer in found]


def test_a_teacher_of_another_layout_is_refused():
    other = LaViT(**{**OPTIONS, 'arch': dict(ARCH, num_va_layers=(1, 3))})
    student = LaViT(**{**OPTIONS, 'arch': dict(ARCH, embed_dims=(8, 32))})
    with pytest.raises(ValueError, match=r'in the checkpoint'):
        make_teacher(other.state_dict(), student)


def test_a_single_batch_is_refused(mixing):
    with pytest.raises(ValueError, match='1 batches of images: expected at least 2'):
        fit(*mixing, batches(1))


def test_images_are_read_as_a_classifiers_test_reads_them(tmp_path):
    (tmp_path / 'class').mkdir()
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, 32:96] = (10, 20, 30)  # the middle, BGR
    for i in range(9):
        cv2.imwrite(str(tmp_path / 'class' / f'{i}.png'), image)
    (tmp_path / 'notes.txt').write_text('x')
    read = read_images(tmp_path, 56, batch_size=4)
    assert [x.shape for x in read] == [(4, 3, 56, 56)] * 2 + [(1, 3, 56, 56)]
    expected = (torch.tensor([30., 20, 10]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(
        read[0], expected.view(1, 3, 1, 1).expand_as(read[0]), atol=1e-5, rtol=0)
    assert sum(map(len, read_images(tmp_path, 56, most=5, batch_size=4))) == 5
    with pytest.raises(ValueError, match='9 images: expected more than 9'):
        read_images(tmp_path, 56, batch_size=9)
    (tmp_path / 'a.jpg').write_bytes(b'')  # at which OpenCV raises
    with pytest.raises(ValueError, match='a.jpg: not a readable image'):
        read_images(tmp_path, 56, batch_size=4)
