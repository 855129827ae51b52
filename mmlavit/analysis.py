"""What layers attend to, and how alike they are: the measures of attention collapse.

`observe_layers` shows every attention layer of a model at work, by hooks, for LaViT
and for mmpretrain's plain ViT and DeiT. The measures are DeepViT's (arXiv
2103.11886): cosine similarities of attention maps between layers and between heads,
and of tokens; and the two conditions of the DP loss.

Maps are compared on regions: the queries of a key's region are averaged, so that a
map is (heads, M, M) with the same M in all of LaViT's stages.
"""
from contextlib import contextmanager
from functools import partial
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import (FactoredScores, Grid, LayerScores, LessAttention,
                        merge_heads, pool_tokens, pooled_grid,
                        split_heads)
from .lavit import Block

MEASURES = ('map_similarity_to_previous', 'head_similarity',
            'token_similarity', 'asymmetry', 'diagonal_largest')


class Layer(NamedTuple):
    """One attention layer's state for a batch.

    Maps are computed on demand; what a caller does not keep is freed before the
    next layer runs.
    """
    name: str  # its module's, such as 'stages.2.blocks.1'
    stage: int
    kind: str  # 'VA', 'LA' or 'ViT'
    grid: Grid  # of the queries
    ratio: int  # spatial reduction from queries to keys
    tokens: Tensor  # (B, N, C), the layer's output
    scores: LayerScores
    to_probabilities: Callable[[LayerScores], Tensor]

    @property
    def key_grid(self) -> Grid:
        return pooled_grid(self.grid, self.ratio)

    def attention_of(self, queries: Sequence[int]) -> Tensor:
        """Attention maps (B, heads, len(queries), M) of chosen queries."""
        return torch.cat([
            self.to_probabilities(self.scores.rows(i, i + 1)) for i in queries
        ], 2)

    def region_scores(self) -> Tensor:
        """Raw scores between regions (B, heads, M, M)."""
        return self.scores.pool_queries(self.grid, self.ratio).dense()

    def region_map(self) -> Tensor:
        """Attention map (B, heads, M, M), averaged over each region's queries.

        One row of regions at a time: never the whole N x M map.
        """
        height, width = self.grid
        rows = []
        for top in range(0, height, self.ratio):
            strip = min(self.ratio, height - top), width
            attn = self.to_probabilities(
                self.scores.rows(top * width, (top + strip[0]) * width))
            # (B, heads, strip, M) -> (B, strip, heads * M) and back
            pooled = pool_tokens(merge_heads(attn), strip, self.ratio)
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
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Block):
            handles.append(module.register_forward_hook(
                lavit_hook(name, callback)))
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


def lavit_hook(name: str, callback: Callable) -> Callable:

    def hook(block: Block, args: tuple, output: tuple) -> None:
        tokens, scores = output
        attn = block.attn
        kind = 'LA' if isinstance(attn, LessAttention) else 'VA'
        stage = int(name.split('stages.')[1].split('.')[0])
        callback(Layer(name, stage, kind, args[1], attn.ratio(args[1]), tokens,
                       scores, attn.probabilities))

    return hook


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

        callback(Layer(f'{name}.layers.{i}'.lstrip('.'), 0, 'ViT', held['grid'],
                       1, tokens[:, extra:], scores, probabilities))

    handles = [vit.patch_embed.register_forward_hook(embedded)]
    for i, layer in enumerate(vit.layers):
        handles += [layer.attn.register_forward_pre_hook(before),
                    layer.register_forward_hook(partial(after, i))]
    return handles


def map_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of two layers' maps (B, heads, M, M), averaged.

    Of each key's column, what it gives to all queries, as in DeepViT; head by
    head, or of the means over heads where their numbers differ.
    """
    if a.shape[1] != b.shape[1]:
        a, b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    # Scaled first: the norm of what hardly a query sees would be lost.
    a, b = (x / x.abs().amax(2, keepdim=True).clamp_min(1e-37) for x in (a, b))
    similarity = F.cosine_similarity(a, b, dim=2)
    # A key that no query sees, in neither map: the same, though 0 / 0.
    unseen = (a.abs().amax(2) < .5) & (b.abs().amax(2) < .5)
    return similarity.masked_fill(unseen, 1.).mean()


def mean_pairwise_cosine(x: Tensor) -> Tensor:
    """Mean cosine over all pairs of the n vectors in (..., n, d)."""
    n = x.shape[-2]
    x = F.normalize(x, dim=-1)
    # |sum of x|^2 counts every pair twice and each vector with itself.
    total = x.sum(-2).square().sum(-1)
    own = x.square().sum((-2, -1))
    return ((total - own) / (n * (n - 1))).mean()


def head_similarity(attn: Tensor) -> Tensor:
    """Mean cosine between the maps of a layer's heads; nan with one head."""
    if attn.shape[1] == 1:
        return attn.new_tensor(float('nan'))
    # (B, keys, heads, queries)
    return mean_pairwise_cosine(attn.permute(0, 3, 1, 2))


def asymmetry(attn: Tensor) -> Tensor:
    """Mean over rows of ``sum_j |A_ij - A_ji|``: 0 to 2."""
    return (attn - attn.mT).abs().sum(-1).mean()


def diagonal_largest(attn: Tensor) -> Tensor:
    """Share of rows whose diagonal is the largest entry: 0 to 1."""
    diagonal = attn.diagonal(dim1=-2, dim2=-1)
    return (diagonal >= attn.amax(-1)).float().mean()


class Similarity:
    """Running means of all measures over batches.

    To compare every layer with every other, a batch's region maps of all layers are
    held at a time: batch x heads x M x M for each layer. Use batch 1 for large inputs.

    Example:
        >>> similarity = Similarity()
        >>> for images in batches:
        ...     with similarity.observe(model), torch.no_grad():
        ...         model(images)
        >>> similarity.result()['layers'][3]['token_similarity']
    """

    def __init__(self) -> None:
        self.images = 0
        self.sums: Dict = {}
        self.layers: List[dict] = []

    @contextmanager
    def observe(self, model: nn.Module) -> Iterator[None]:
        """Adds the forward in this context; one batch at a time."""
        maps, infos, batch = [], [], 0

        def add(key, value: Tensor) -> None:
            self.sums[key] = self.sums.get(key, 0.) + value.item() * batch

        def callback(layer: Layer) -> None:
            nonlocal batch
            batch = len(layer.tokens)
            attn, i = layer.region_map().float(), len(maps)
            maps.append(attn)
            infos.append(dict(layer=i, name=layer.name, stage=layer.stage,
                              kind=layer.kind))
            add((i, 'head_similarity'), head_similarity(attn))
            add((i, 'token_similarity'),
                mean_pairwise_cosine(layer.tokens.float()))
            # On the map that the DP loss sees.
            seen = layer.region_scores().float().softmax(-1)
            add((i, 'asymmetry'), asymmetry(seen))
            add((i, 'diagonal_largest'), diagonal_largest(seen))

        with observe_layers(model, callback):
            yield
        for i, a in enumerate(maps):
            for j, b in enumerate(maps[:i]):
                if a.shape[2:] == b.shape[2:]:
                    add((i, j), map_similarity(a, b))
        self.layers = infos
        self.images += batch

    def result(self) -> dict:
        """``layers``: the measures of each; ``map_similarity``: each to each."""
        count = len(self.layers)
        matrix = [[1. if i == j else None for j in range(count)]
                  for i in range(count)]
        layers = [dict(info) for info in self.layers]
        for (i, what), value in self.sums.items():
            value /= self.images
            if isinstance(what, int):
                matrix[i][what] = matrix[what][i] = value
            else:
                layers[i][what] = None if value != value else value
        for i, layer in enumerate(layers):
            layer['map_similarity_to_previous'] = (
                matrix[i][i - 1]
                if i and layers[i - 1]['stage'] == layer['stage'] else None)
        return dict(images=self.images, layers=layers, map_similarity=matrix)
