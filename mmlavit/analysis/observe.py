"""What layers attend to, layer by layer, while a model is at work.

By hooks, for LaViT and for mmpretrain's plain ViT and DeiT. Maps are compared on regions: the queries of a key's region are averaged, so that a
map is (heads, M, M) with the same M in all of LaViT's stages.
"""
from contextlib import contextmanager
from functools import partial
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from ..models.layers.block import Block, Stage
from ..models.layers.grid import (Grids, merge_heads, pool_tokens,
                                  split_heads)
from ..models.layers.scores import FactoredScores, LayerScores


class Layer(NamedTuple):
    """One attention layer's state for a batch.

    Maps are computed on demand; what a caller does not keep is freed before the
    next layer runs.
    """
    name: str  # its module's, such as 'stages.2.blocks.1'
    stage: int
    kind: str  # 'VA', 'LA' or 'ViT'
    grids: Grids
    tokens: Tensor  # (B, N, C), the layer's output
    scores: LayerScores
    to_probabilities: Callable[[LayerScores], Tensor]

    def attention_of(self, queries: Sequence[int]) -> Tensor:
        """Attention maps (B, heads, len(queries), M) of chosen queries."""
        return torch.cat([
            self.to_probabilities(self.scores.rows(i, i + 1)) for i in queries
        ], 2)

    def region_scores(self) -> Tensor:
        """Raw scores between regions (B, heads, M, M)."""
        return self.scores.between_regions(self.grids).dense()

    def region_map(self) -> Tensor:
        """Attention map (B, heads, M, M), averaged over each region's queries.

        One row of regions at a time: never the whole N x M map.
        """
        (height, width), ratio = self.grids
        rows = []
        for top in range(0, height, ratio):
            strip = min(ratio, height - top), width
            attn = self.to_probabilities(
                self.scores.rows(top * width, (top + strip[0]) * width))
            # (B, heads, strip, M) -> (B, strip, heads * M) and back
            pooled = pool_tokens(merge_heads(attn), strip, ratio)
            rows.append(split_heads(pooled, attn.shape[1]))
        return torch.cat(rows, 2)


@contextmanager
def observe_layers(model: nn.Module,
                   callback: Callable[[Layer], None]) -> Iterator[None]:
    """Calls back for every attention layer of each forward in this context.

    Nothing about the model changes: the hooks are gone afterwards, and the layers
    stay factored where they are. Use it in eval mode: in training mode the batch
    norm of Re-Attention would count each map that is asked for again.

    Args:
        model (nn.Module): A LaViT, mmpretrain's VisionTransformer, or any model
            that contains one.
        callback (Callable[[Layer], None]): Called in the order of the layers.

    Raises:
        TypeError: If there is no layer that can be observed.
    """
    handles, stages = [], 0
    for name, module in model.named_modules():
        if isinstance(module, Stage):
            handles += stage_hooks(stages, name, module, callback)
            stages += 1
        elif is_plain_vit(module):
            handles += vit_hooks(name, module, callback)
    if not handles:
        raise TypeError(
            f'{type(model).__name__} has no layer to observe: expected a LaViT '
            "or mmpretrain's VisionTransformer in it")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stage_hooks(number: int, name: str, stage: Stage,
                callback: Callable) -> list:
    """Of a LaViT stage's layers, whose output is tokens and scores."""

    def after(i: int, block: Block, args: tuple, output: tuple) -> None:
        tokens, scores = output
        callback(
            Layer(f'{name}.blocks.{i}', number, stage.layers[i].kind, args[1],
                  tokens, scores, block.attn.probabilities))

    return [block.register_forward_hook(partial(after, i))
            for i, block in enumerate(stage.blocks)]


def is_plain_vit(module: nn.Module) -> bool:
    """Whether it is built as mmpretrain's VisionTransformer is."""
    return (hasattr(module, 'num_extra_tokens') and hasattr(module, 'patch_embed')
            and all(type(getattr(layer, 'attn', None)).__name__ ==
                    'MultiheadAttention' and hasattr(layer.attn, 'qkv')
                    for layer in getattr(module, 'layers', [None])))


def vit_hooks(name: str, vit: nn.Module, callback: Callable) -> list:
    """Of a plain ViT's layers: the input gives Q and K, the output the tokens."""
    extra, held = vit.num_extra_tokens, {}  # class and distillation tokens

    def embedded(patch_embed: nn.Module, args: tuple, output: tuple) -> None:
        held['grid'] = tuple(output[1])

    def before(attn: nn.Module, args: tuple) -> None:
        # The projection again, for it is not among the outputs.
        q, k, _ = attn.qkv(args[0]).chunk(3, dim=-1)
        held['scores'] = q, k * attn.head_dims**-0.5, attn.num_heads

    def after(i: int, layer: nn.Module, args: tuple, tokens: Tensor) -> None:
        q, k, heads = held.pop('scores')
        scores = LayerScores(
            FactoredScores(q[:, extra:], k[:, extra:], heads))

        def probabilities(rows: LayerScores) -> Tensor:
            # What the class token draws is no region's, but is not theirs.
            others = FactoredScores(rows.own.q, k[:, :extra], heads).dense()
            whole = torch.cat([others, rows.dense()], -1).softmax(-1)
            return whole[..., extra:]

        callback(Layer(f'{name}.layers.{i}'.lstrip('.'), 0, 'ViT',
                       Grids(held['grid'], 1), tokens[:, extra:], scores,
                       probabilities))

    handles = [vit.patch_embed.register_forward_hook(embedded)]
    for i, layer in enumerate(vit.layers):
        handles += [layer.attn.register_forward_pre_hook(before),
                    layer.register_forward_hook(partial(after, i))]
    return handles
