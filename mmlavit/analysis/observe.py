"""What layers attend to, layer by layer, while a model is at work.

Layers hand out their state, in LaViT and in every class that mmlavit can give less
attention: ViT, DeiT, PVT and Swin. Maps are compared on regions: the queries of a key's
region are averaged, so that a map is (heads, M, M) with the same M in all of LaViT's
stages.
"""
from contextlib import ExitStack, contextmanager
from typing import Callable, Iterator

from torch import nn

from ..models.layers.step import Layer, Observable
from ..plugins.add import stock_parts
from ..plugins.convert import convert

__all__ = ['Layer', 'observe_layers']


@contextmanager
def observe_layers(model: nn.Module,
                   callback: Callable[[Layer], None]) -> Iterator[None]:
    """Calls back for every attention layer of each forward in this context.

    Nothing about the model changes: afterwards it is as it was, and the layers stay
    factored where they are. Use it in eval mode: in training mode the batch norm of
    Re-Attention would count each map that is asked for again.

    Args:
        model (nn.Module): A LaViT, a model of a class that `add_less_attention` knows,
            or any model that contains one.
        callback (Callable[[Layer], None]): Called in the order of the layers.

    Raises:
        TypeError: If there is no layer that can be observed.
    """
    with ExitStack() as undo:
        for part, family in stock_parts(model):
            if not observable_layers(part):
                undo.callback(convert(part, family, layers=()).remove)
        layers = observable_layers(model)
        if not layers:
            raise TypeError(
                f'{type(model).__name__} has no layer to observe: expected a LaViT, '
                "a ViT, DeiT, PVT or Swin of the toolboxes, or timm's ViT in it")
        for name, layer in layers.items():
            watch(undo, name, layer, callback)
        yield


def observable_layers(model: nn.Module) -> dict:
    """The layers that hand out their state, by name."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, Observable)}


def watch(undo: ExitStack, name: str, layer: Observable,
          callback: Callable[[Layer], None]) -> None:
    """Adds an observer, who is told the layer's name in the whole model."""

    def observer(state: Layer) -> None:
        callback(state._replace(name=name))

    def leave() -> None:
        others = tuple(x for x in layer.observers if x is not observer)
        del layer.observers  # what is left is the class's: ()
        if others:
            layer.observers = others

    layer.observers = (*layer.observers, observer)
    undo.callback(leave)
