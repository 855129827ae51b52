"""What of a model is exported: modules from images to a tuple of tensors.

Images are what the model's data preprocessor makes of them: normalised, padded.
"""
from typing import Sequence, Set, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.images import image_channels


class Part(nn.Module):
    """A part of a model.

    Attributes:
        task (str): 'backbone', 'classification', 'segmentation', 'dense detection'
            or 'detection'; a runtime sees it in the file's metadata.
        inputs (Sequence[str]): Names of the inputs.
        outputs (Sequence[str]): Names of the outputs.
        divisor (int): What the sides of images must be multiples of. Default: 1.
    """
    task: str
    divisor: int = 1
    inputs: Sequence[str] = ('images', )
    outputs: Sequence[str]

    def example(self, batch: int, height: int, width: int) -> Tuple[Tensor, ...]:
        """Random inputs of that size, or of the next that fits."""
        channels = image_channels(getattr(self, 'model', self))
        return (torch.rand(batch, channels, *self.fitting(height, width)), )

    def fitting(self, *sides: int) -> Tuple[int, ...]:
        """The next multiples of ``divisor``."""
        return tuple(-(-side // self.divisor) * self.divisor for side in sides)

    def numbers(self) -> Set[int]:
        """What may stand in a graph by right: the sizes of the weights."""
        return {side for x in self.state_dict().values() for side in x.shape}


class BackboneMaps(Part):
    """The maps of ``out_indices``."""
    task = 'backbone'

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone
        indices = getattr(model.backbone, 'out_indices', None)
        if indices is None:  # timm's, as mmpretrain wraps it
            with torch.no_grad():
                indices = range(len(model.backbone(*self.example(1, 64, 64))))
        self.outputs = [f'map{i}' for i in indices]

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        return self.backbone(images)


class ClassLogits(Part):
    """Logits (B, classes) of a classifier."""
    task = 'classification'
    outputs = ['logits']

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        return (self.model(images, mode='tensor'), )


class PixelLogits(Part):
    """Logits (B, classes, H, W) of a segmentor, at the size of the images."""
    task = 'segmentation'
    outputs = ['logits']

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        replace_upsampling(model)

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        metas = [dict(img_shape=tuple(images.shape[2:]))]
        return (self.model.encode_decode(images, metas), )


class DenseDetections(Part):
    """Scores and boxes of a dense head at every anchor, as the head leaves them."""
    task = 'dense detection'

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Some heads have a third output, as the centerness of FCOS.
        kinds = 'cls_score', 'bbox_pred', 'other'
        with torch.no_grad():
            outs = model(*self.example(1, 64, 64), mode='tensor')
        self.outputs = [f'{kind}{i}' for kind, levels in zip(kinds, outs)
                        for i in range(len(levels))]

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        return tuple(x for xs in self.model(images, mode='tensor') for x in xs)


class Upsample(nn.Module):
    """mmsegmentation's ``Upsample``, whose ``int(size * factor)`` freezes the size."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.factor = stock.scale_factor
        self.how = dict(mode=stock.mode, align_corners=stock.align_corners)

    def forward(self, x: Tensor) -> Tensor:
        size = [side * int(self.factor) for side in x.shape[2:]]
        return F.interpolate(x, size, **self.how)


def replace_upsampling(model: nn.Module) -> None:
    """Changes the modules of an mmsegmentation model that would freeze sizes."""
    from mmseg.models.utils import Upsample as Stock
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, Stock) and not child.size:
                if child.scale_factor != int(child.scale_factor):
                    raise ValueError(
                        f'export: {name} (mmseg Upsample): scale_factor='
                        f'{child.scale_factor}: expected a whole number')
                setattr(parent, name, Upsample(child))
