"""Theta and Psi fitted to the attention of the network that a LaViT was made from.

A converted less-attention layer begins as a copy of its predecessor's attention. Its
own layer of before, whose Q and K were dropped, can tell what it should be: no labels
are needed, and nothing else is trained. Our choice; the paper trains from scratch.
"""
import math
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Sequence

import mmcv
import numpy as np
import torch
from torch import Tensor, nn

from ..analysis.images import find_images, read_image
from ..analysis.observe import Layer, observe_layers
from ..models.backbones.lavit import LaViT
from ..models.layers.grid import Grids
from ..models.layers.scores import LayerScores

# ImageNet's, RGB, as PVTv2 was trained with.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class FittedLayer(NamedTuple):
    """The mean KL divergence (nats) of a layer's map, on images not fitted to."""
    name: str  # its module's, such as 'stages.2.blocks.1'
    before: float
    after: float


class Example(NamedTuple):
    """What a layer is given for a batch, and what it is to make of it."""
    scores: LayerScores  # the predecessor's
    grids: Grids
    attention: Tensor  # (B, heads, N, M), the teacher's


def make_teacher(weights: dict, student: LaViT) -> LaViT:
    """The network that the weights are of: the student's layout, all layers VA.

    Raises:
        ValueError: If the student's widths or depths are not those of the weights.
    """
    arch = dict(student.arch, num_va_layers=student.arch['depths'],
                attn_residual=False)
    teacher = LaViT(
        arch,
        in_channels=student.in_channels,
        sr_ratios=[stage.sr_ratio for stage in student.stages],
        max_key_grid=student.stages[0].max_key_grid,
        out_indices=student.out_indices)
    teacher.load_state_dict(weights)
    return teacher.eval()


def fit(student: LaViT, teacher: nn.Module, batches: Sequence[Tensor],
        steps: int = 300, lr: float = 0.1) -> List[FittedLayer]:
    """Fits Theta and Psi of each LA layer to the teacher's map of that layer.

    By Adam, its step falling to 0, on the KL divergence of the layer's attention maps
    from the teacher's; layer by layer, the deepest last, so that each builds on those
    fitted before. All other weights stay as they are. Every fifth batch is left out
    and measured; a layer that does not come nearer on these stays as it was.

    Args:
        student (LaViT): The converted network; changed in place.
        teacher (nn.Module): A LaViT with as many layers and heads, see
            `make_teacher`.
        batches (Sequence[Tensor]): Images (B, C, H, W), at least two batches, all of
            one size, which should be the student's ``pretrain_img_size``.
        steps (int): Steps for each layer, a batch each. Defaults to 300.
        lr (float): Defaults to 0.1.

    Raises:
        ValueError: If there are fewer than two batches.
    """
    if len(batches) < 2:
        raise ValueError(f'{len(batches)} batches of images: expected at least 2, one '
                         'to fit to and one to measure on')
    student.eval()
    return [
        fit_layer(student.get_submodule(f'{name}.attn'), name,
                  partial(examples, student, teacher, name, batches), steps, lr)
        for name in student.less_attention_layers()
    ]


def fit_layer(attn: nn.Module, name: str, make: Callable[[], Iterator[Example]],
              steps: int, lr: float) -> FittedLayer:
    """Fits one layer; ``make`` gives its examples."""
    every = list(make())
    measured = every[::5]
    fitted = [example for i, example in enumerate(every) if i % 5]
    before = mean_divergence(attn, measured)
    weights = [*attn.theta.parameters(), *attn.psi.parameters()]
    start = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1., 0., steps)
    for step in range(steps):
        optimizer.zero_grad()
        divergence(attn, fitted[step % len(fitted)]).backward(inputs=weights)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    after = mean_divergence(attn, measured)
    if after < before:
        return FittedLayer(name, before, after)
    for weight, kept in zip(weights, start):
        weight.data.copy_(kept)
    return FittedLayer(name, before, before)


@torch.no_grad()
def examples(student: LaViT, teacher: nn.Module, name: str,
             batches: Sequence[Tensor]) -> Iterator[Example]:
    """What the layer of this name meets in the student and does in the teacher."""
    given, maps = [], []

    def keep_input(attn: nn.Module, args: tuple) -> None:
        given.append(args[1:])

    def keep_map(layer: Layer) -> None:
        if layer.name == name:
            maps.append(layer.probabilities(0, math.prod(layer.grids.queries)))

    handle = student.get_submodule(f'{name}.attn').register_forward_pre_hook(
        keep_input)
    try:
        for images in batches:
            student(images)
            with observe_layers(teacher, keep_map):
                teacher(images)
            grids, scores = given.pop()
            yield Example(scores, grids, maps.pop())
    finally:
        handle.remove()


def divergence(attn: nn.Module, example: Example) -> Tensor:
    """Mean KL(teacher's || layer's) over images, heads and queries, in nats."""
    scores = example.scores.mix_tokens(attn.theta, attn.psi, example.grids)
    own = scores.dense().log_softmax(-1)
    theirs = example.attention
    return (torch.xlogy(theirs, theirs) - theirs * own).sum(-1).mean()


@torch.no_grad()
def mean_divergence(attn: nn.Module, chosen: Sequence[Example]) -> float:
    return float(torch.stack([divergence(attn, x) for x in chosen]).mean())


def read_images(folder: Path, size: int = 224, most: int = 256,
                batch_size: int = 8) -> List[Tensor]:
    """Images of a folder, and of those in it, as a classifier's test sees them.

    Shorter side to ``size / 0.875``, a square of ``size`` from the middle, ImageNet's
    mean and standard deviation.

    Args:
        folder (Path): Where they are.
        size (int): Height and width in pixels. Defaults to 224.
        most (int): From a larger folder so many, spread evenly over the sorted
            paths. Defaults to 256.
        batch_size (int): Defaults to 8.

    Returns:
        list[Tensor]: Batches (B, 3, size, size), RGB.

    Raises:
        FileNotFoundError: If there are no images.
        ValueError: If there are fewer than two batches, or one cannot be read.
    """
    paths = find_images(folder, most)
    if len(paths) <= batch_size:
        raise ValueError(f'{folder}: {len(paths)} images: expected more than '
                         f'{batch_size}, some hundred at best')
    images = torch.stack([crop_middle(read_image(path, None), size) for path in paths])
    return list(images.split(batch_size))


def crop_middle(image: np.ndarray, size: int) -> Tensor:
    """BGR bytes (H, W, 3) -> (3, size, size); see `read_images`."""
    short = round(size / 0.875)
    height, width = image.shape[:2]
    scale = short / min(height, width)
    image = mmcv.imresize(image, (max(short, round(width * scale)),
                                  max(short, round(height * scale))))
    top, left = ((length - size) // 2 for length in image.shape[:2])
    image = image[top:top + size, left:left + size]
    image = mmcv.imnormalize(image, np.array(MEAN), np.array(STD))  # BGR to RGB
    return torch.from_numpy(image).permute(2, 0, 1).float()
