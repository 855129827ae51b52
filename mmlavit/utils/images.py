"""What images a model takes."""
from torch import nn


def image_channels(model: nn.Module) -> int:
    """Channels of the images that a model is made for, by its first convolution.

    Args:
        model (nn.Module): A backbone, or a model that has one; few classes tell it
            otherwise. Without a convolution: 3.
    """
    convs = (x for x in getattr(model, 'backbone', model).modules()
             if isinstance(x, nn.Conv2d))
    return next((conv.in_channels for conv in convs), 3)
