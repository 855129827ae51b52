"""Class activation maps of whole models: where a class is seen.

HiResCAM (arXiv 2011.08891) on one of the backbone's maps, for classifiers, segmentors
and dense detectors alike. Grad-CAM (arXiv 1610.02391) weights channels by their mean
gradient; behind global pooling both are the same, but a detector's objects lie at places.
"""
from pathlib import Path
from typing import Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.visualization import Visualizer
from torch import Tensor, nn

from .images import preprocess, read_image


def hires_cam(model: nn.Module, images: Tensor,
              categories: Optional[Sequence[int]] = None,
              index: int = -1) -> Tuple[Tensor, Tensor, Tensor]:
    """Class activation maps of a batch.

    A map times the gradient of the class's score by it, summed over the channels: by
    how much each place raises the score. What is negative is 0.

    Args:
        model (nn.Module): A model of any of the three toolboxes, in eval mode.
        images (Tensor): (B, 3, H, W) of the model's data preprocessor.
        categories (Sequence[int], optional): The class of each image. Defaults to
            the one of the highest score.
        index (int): Which of the maps that the backbone returns. Defaults to the
            last.

    Returns:
        tuple[Tensor, Tensor, Tensor]: The maps (B, h, w), at least 0; the classes
        and their scores (see `class_scores`), both (B, ).

    Raises:
        ValueError: If there is no such map or class, if the model does not read the
            map, or if it is a model of another kind.
    """
    if not hasattr(model, 'backbone'):
        raise ValueError(f'class activation maps: {type(model).__name__}: expected a '
                         'model with a backbone')
    maps = []
    handle = model.backbone.register_forward_hook(
        lambda _, args, outs: maps.extend(outs))
    try:
        with torch.enable_grad():  # also if all weights are frozen
            scores = class_scores(model, images.detach().requires_grad_())
    finally:
        handle.remove()
    if not -len(maps) <= index < len(maps) or maps[index].dim() != 4:
        raise ValueError(f'index={index}: expected that of a map (B, C, h, w); the '
                         f'backbone returns {[tuple(x.shape) for x in maps]}')
    if categories is None:
        categories = scores.argmax(1)
    categories = torch.as_tensor(categories, device=scores.device)
    if not 0 <= categories.min() <= categories.max() < scores.shape[1]:
        raise ValueError(f'categories={categories.tolist()}: expected at least 0 and '
                         f'below {scores.shape[1]}')
    chosen = scores.gather(1, categories[:, None])[:, 0]
    gradients = torch.autograd.grad(chosen.sum(), maps, allow_unused=True)
    if gradients[index] is None:
        read = [i for i, gradient in enumerate(gradients) if gradient is not None]
        raise ValueError(f'index={index}: expected that of a map that the model reads, '
                         f'one of {read}')
    cams = (gradients[index] * maps[index]).sum(1).relu()
    return cams.detach(), categories, chosen.detach()


def class_scores(model: nn.Module, images: Tensor) -> Tensor:
    """How much of each class a model sees in each image, (B, classes).

    The logit of a classifier. The mean of a segmentor's logits over all pixels, each
    of which counts for the class that it is given. The sum of a dense detector's
    scores, 0 to 1, over all anchors where they are above its ``score_thr`` (our
    choice).

    Raises:
        ValueError: If it is a model of another kind, as a detector of two stages.
    """
    head = getattr(model, 'bbox_head', None)
    if hasattr(model, 'encode_decode'):
        logits = model.encode_decode(
            images, [dict(img_shape=tuple(images.shape[2:]))] * len(images))
        given = torch.zeros_like(logits).scatter(1, logits.argmax(1, True), 1)
        return (logits * given).mean((2, 3))
    if hasattr(head, 'cls_out_channels'):
        levels = [anchor_scores(x, head) for x in model(images, mode='tensor')[0]]
        least = (head.test_cfg or {}).get('score_thr', 0)
        return sum((x * (x > least)).sum(1) for x in levels)
    if hasattr(model, 'head'):
        return model(images, mode='tensor')
    raise ValueError(
        f'class activation maps: {type(model).__name__}: expected an image '
        'classifier, an encoder-decoder segmentor or a single-stage detector')


def anchor_scores(cls_score: Tensor, head: nn.Module) -> Tensor:
    """A level's map (B, anchors * classes, h, w) -> (B, all anchors, classes)."""
    logits = cls_score.permute(0, 2, 3, 1).flatten(1).unflatten(
        1, (-1, head.cls_out_channels))
    if head.use_sigmoid_cls:
        return logits.sigmoid()
    return logits.softmax(2)[..., :-1]  # the last is the background


def draw_cam(model: nn.Module, file: Path, category: Optional[int] = None,
             index: int = -1, size: Optional[Tuple[int, int]] = None
             ) -> Tuple[np.ndarray, int, float]:
    """An image with its class activation map over it, red where it is highest.

    Args:
        model (nn.Module): As for `hires_cam`.
        file (Path): The image.
        category (int, optional): The class. Defaults to that of the highest score.
        index (int): Which of the backbone's maps. Defaults to the last.
        size (tuple[int, int], optional): (H, W) that it is resized to. Defaults to
            its own.

    Returns:
        tuple[np.ndarray, int, float]: The picture (H, W, 3), BGR; the class and its
        score.

    Raises:
        ValueError: As of `hires_cam`; or if the file cannot be read.
    """
    image = read_image(file, size)
    inputs = preprocess(model, [image])
    cams, found, scores = hires_cam(
        model, inputs, None if category is None else [category], index)
    height, width = image.shape[:2]
    # Inputs may be padded at the bottom and right.
    cam = F.interpolate(cams[None], inputs.shape[2:], mode='bilinear')[
        0, :, :height, :width]
    picture = Visualizer.draw_featmap(cam, image[..., ::-1].copy())
    return picture[..., ::-1], found.item(), scores.item()
