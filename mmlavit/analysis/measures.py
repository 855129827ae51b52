"""How alike layers are: the measures of attention collapse.

They are DeepViT's (arXiv 2103.11886): cosine similarities of attention maps between
layers and between heads, and of tokens. Ours are the two conditions of the DP loss,
and whether a map is alive at all: its entropy, and how far its scores lie apart.
"""
import math
from contextlib import contextmanager
from typing import Dict, Iterator, List

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .observe import Layer, observe_layers

MEASURES = ('map_similarity_to_previous', 'head_similarity',
            'token_similarity', 'asymmetry', 'diagonal_largest', 'entropy',
            'score_deviation')


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
    """Share of rows whose diagonal is the largest entry: 0 to 1.

    Equal entries are all the largest, so it is 1 for a uniform map.
    """
    diagonal = attn.diagonal(dim1=-2, dim2=-1)
    return (diagonal >= attn.amax(-1)).float().mean()


def entropy(attn: Tensor) -> Tensor:
    """Mean entropy of the rows over its largest: 1 if uniform, 0 of a single key.

    Nan with one key, whose map has no other form, and for a map with negative entries,
    as Re-Attention's, which has none.
    """
    keys = attn.shape[-1]
    if keys == 1 or (attn < 0).any():
        return attn.new_tensor(float('nan'))
    return torch.special.entr(attn).sum(-1).mean() / math.log(keys)


def score_deviation(scores: Tensor) -> Tensor:
    """Mean standard deviation of raw scores (B, heads, N, M) over the keys."""
    return scores.std(-1, correction=0).mean()


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
        self.lanes: List[tuple] = []  # which may inherit from each other

    @contextmanager
    def observe(self, model: nn.Module) -> Iterator[None]:
        """Adds the forward in this context; one batch at a time."""
        maps, infos, lanes, batch = [], [], [], 0

        def add(key, value: Tensor) -> None:
            self.sums[key] = self.sums.get(key, 0.) + value.item() * batch

        def callback(layer: Layer) -> None:
            nonlocal batch
            batch = len(layer.tokens)
            attn, i = layer.region_map().float(), len(maps)
            maps.append(attn)
            infos.append(dict(layer=i, name=layer.name, stage=layer.stage,
                              kind=layer.kind))
            lanes.append((layer.stage, layer.lane))
            add((i, 'head_similarity'), head_similarity(attn))
            add((i, 'token_similarity'),
                mean_pairwise_cosine(layer.tokens.float()))
            add((i, 'entropy'), entropy(attn))
            # As the DP loss sees it, up to 14 keys a side.
            scores = layer.region_scores().float()
            add((i, 'score_deviation'), score_deviation(scores))
            seen = scores.softmax(-1)
            add((i, 'asymmetry'), asymmetry(seen))
            add((i, 'diagonal_largest'), diagonal_largest(seen))

        with observe_layers(model, callback):
            yield
        for i, a in enumerate(maps):
            for j, b in enumerate(maps[:i]):
                # Windows of different stages are of different numbers.
                if a.shape[0] == b.shape[0] and a.shape[2:] == b.shape[2:]:
                    add((i, j), map_similarity(a, b))
        self.layers, self.lanes = infos, lanes
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
        last = {}
        for i, (layer, lane) in enumerate(zip(layers, self.lanes)):
            layer['map_similarity_to_previous'] = (
                matrix[i][last[lane]] if lane in last else None)
            last[lane] = i
        return dict(images=self.images, layers=layers, map_similarity=matrix)


def similarity_rows(results: Dict[str, dict]) -> List[dict]:
    """Every measure of every layer of several models as rows of a table.

    Args:
        results (dict[str, dict]): Of `Similarity.result`, by the models' names.
    """
    columns = ('layer', 'name', 'stage', 'kind', *MEASURES)
    return [
        dict(model=model, **{column: layer[column] for column in columns})
        for model, result in results.items() for layer in result['layers']
    ]
