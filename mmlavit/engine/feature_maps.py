"""Whether a model reads the maps of its backbone.

Without it a map that does not fit is a bare ``AssertionError`` of the neck. One that
nobody reads, so that parameters get no gradient, is noticed by DDP alone, at the second
step and by the numbers of parameters.

Each `mmengine.model.BaseModel` is looked at that has a LaViT inside, or a PVT or Swin
with less attention. Whether the maps fit is asked when it is built and at its first
forward; whether the losses depend on all of them, at its first training forward.
"""
import logging
from typing import List, Optional, Sequence, Set

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..models.backbones.maps import MapBackbone
from ..models.layers.tracing import is_compiling

POOLINGS = 'GlobalAveragePooling', 'GeneralizedMeanPooling'  # mmpretrain's necks


def channels_of(backbone: MapBackbone) -> List[int]:
    channels = backbone.stage_channels()
    return [channels[i] for i in backbone.out_indices]


def check_neck(backbone: MapBackbone, name: str, neck: nn.Module) -> None:
    """Refuses a neck that is for other maps; some necks take the last one first."""
    first = neck[0] if isinstance(neck, nn.Sequential) and len(neck) else neck
    wanted = getattr(first, 'in_channels', None)
    if (isinstance(wanted, (list, tuple))
            and sorted(wanted) != sorted(channels_of(backbone))):
        refuse(backbone, f'model.{name}.in_channels={list(wanted)}', wanted)


def check_decode_head(backbone: MapBackbone, name: str, head: nn.Module) -> None:
    """Refuses a head of mmseg's that is for other maps than ``in_index`` selects."""
    wanted, index = (getattr(head, key, None) for key in ('in_channels', 'in_index'))
    if wanted is None or index is None:
        return
    channels = channels_of(backbone)
    selected = [channels[i] if -len(channels) <= i < len(channels) else None
                for i in (index if isinstance(index, (list, tuple)) else [index])]
    if isinstance(wanted, (list, tuple)):
        fits = list(wanted) == selected
    else:  # of one map, or of several put together
        fits = None not in selected and wanted == sum(selected)
    if not fits:
        refuse(backbone, f'model.{name}.in_channels={wanted} with in_index={index}')


def check_classifier_head(backbone: MapBackbone, name: str, head: nn.Module) -> None:
    """Refuses a head of mmpretrain's, which reads the last map, for another one."""
    wanted = getattr(head, 'in_channels', None)
    if isinstance(wanted, int) and wanted != channels_of(backbone)[-1]:
        refuse(backbone, f'model.{name}.in_channels={wanted}, of the last map', [wanted])


def refuse(backbone: MapBackbone, reader: str, wanted: Sequence[int] = ()) -> None:
    dims, channels = list(backbone.stage_channels()), channels_of(backbone)
    other = ''
    if wanted and set(wanted) <= set(dims) and len(set(dims)) == len(dims):
        other = f', or out_indices={tuple(sorted(dims.index(dim) for dim in wanted))}'
    raise ValueError(
        f'LaViT: out_indices={backbone.out_indices}: its {len(channels)} maps have '
        f'{channels} channels, which does not fit {reader}: set that to match{other}')


def check_reader(model: nn.Module, name: str, reader: Optional[nn.Module]) -> None:
    """Refuses a neck or a head that does not fit the maps of ``model.backbone``.

    Raises:
        ValueError: Naming ``out_indices``, channels, and what would be right.
    """
    backbone, neck = (model._modules.get(key) for key in ('backbone', 'neck'))
    if not isinstance(backbone, MapBackbone) or reader is None:
        return
    if name == 'neck':
        check_neck(backbone, name, reader)
    elif name in ('decode_head', 'auxiliary_head') and neck is None:
        heads = reader if isinstance(reader, nn.ModuleList) else [reader]
        for head in heads:
            check_decode_head(backbone, name, head)
    elif name == 'head' and type(neck).__name__ in POOLINGS:
        check_classifier_head(backbone, name, reader)


class MapWatch:
    """Hooks that look at a model's first forward; later ones pass through."""

    def __init__(self) -> None:
        self.checked = self.done = False
        self.nodes = None  # during the first training forward: map's index, node

    def begin(self, model: nn.Module, inputs: tuple) -> None:
        """Forward pre-hook of the model."""
        if not self.checked:
            for name, child in model.named_children():
                check_reader(model, name, child)
            self.checked = True
        looks = (not self.done and model.training and torch.is_grad_enabled()
                 and not is_compiling())
        self.nodes = [] if looks else None

    def keep(self, backbone: MapBackbone, inputs: tuple, maps: tuple) -> None:
        """Forward hook of the backbone: the maps' nodes in autograd's graph."""
        if self.nodes is not None:
            self.nodes += [(backbone, i, x.grad_fn)
                           for i, x in zip(backbone.out_indices, maps)]

    def end(self, model: nn.Module, inputs: tuple, losses) -> None:
        """Forward hook of the model: warns of maps that the losses do not need."""
        nodes, self.nodes = self.nodes, None
        if nodes is None or not isinstance(losses, dict):
            return
        self.done = True
        found = reached(losses, {node for _, _, node in nodes})
        for backbone in dict.fromkeys(backbone for backbone, _, _ in nodes):
            own = [(i, node) for each, i, node in nodes if each is backbone]
            read = {i for i, node in own if node in found}
            # Frozen ones are in no graph.
            unread = sorted({i for i, node in own if node is not None} - read)
            if read and not backbone.maps_have_norms():
                # The stages behind it read what an unread map is of.
                unread = [i for i in unread if i > max(read)]
            if read and unread:
                warn(backbone, unread)


def reached(losses: dict, ends: set) -> set:
    """The nodes, of ``ends``, that backward from the losses would come to."""
    tensors = [x for value in losses.values()
               for x in (value if isinstance(value, (list, tuple)) else [value])]
    ahead = [x.grad_fn for x in tensors if isinstance(x, torch.Tensor)]
    seen = {None}
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in ends:
            ahead += [before for before, _ in node.next_functions]
    return seen & ends - {None}


def warn(backbone: MapBackbone, unread: Sequence[int]) -> None:
    rest = tuple(i for i in backbone.out_indices if i not in unread)
    print_log(
        f'LaViT: out_indices={backbone.out_indices}: no loss depends on the maps of '
        f'stages {", ".join(map(str, unread))}: nobody reads them. Set '
        f'model.backbone.out_indices={rest}, and in_channels, in_index and '
        'start_level of the neck and heads to match. They take time, and '
        'distributed training stops at its second step ("Expected to have finished '
        'reduction in the prior iteration") where they have parameters of their own',
        logger='current', level=logging.WARNING)


def attach(parent: nn.Module, name: str, child: Optional[nn.Module]) -> None:
    """Registration hook: looks at a model with such a backbone inside."""
    if not isinstance(parent, BaseModel) or child is None:
        return
    check_reader(parent, name, child)
    backbones = [module for module in child.modules() if isinstance(module, MapBackbone)
                 and id(module) not in watched(parent)]
    if not backbones:
        return  # of none, or registered again, as mmengine does to replace SyncBN
    watch = MapWatch()
    parent.register_forward_pre_hook(watch.begin)
    parent.register_forward_hook(watch.end)
    for backbone in backbones:
        backbone.register_forward_hook(watch.keep)


def watched(parent: nn.Module) -> Set[int]:
    """The ids of the backbones that a model already looks at."""
    return {id(module) for module in parent.modules()
            for hook in module._forward_hooks.values()
            if isinstance(getattr(hook, '__self__', None), MapWatch)
            and isinstance(module, MapBackbone)}


def install() -> None:
    """Every module registered from now on is looked into for such a backbone."""
    register_module_module_registration_hook(attach)
