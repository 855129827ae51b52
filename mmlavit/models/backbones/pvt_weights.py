"""PVTv2's weights in LaViT's names, from whichever code they come."""
import re
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor

from ...utils.checks import require

Weights = Dict[str, Tensor]


class Naming(NamedTuple):
    """How a code base names PVTv2's weights."""
    sign: str  # a name that it alone has, and none without PVTv2's FFN
    first_stage: int  # its number of our stage 0
    rules: Sequence[Tuple[str, str]]  # patterns, and LaViT's names


# The first rule that fits, with {} for the number of the stage.
BLOCK = (
    (r'attn\.sr\.', 'attn.reduction.conv.'),
    (r'attn\.norm\.', 'attn.reduction.norm.'),
    (r'mlp\.(fc\d)\.', r'ffn.\1.'),
    (r'mlp\.dwconv\.(?:dwconv\.)?', 'ffn.dwconv.'),
)
NAMINGS = {
    'the authors': Naming('block1.0.mlp.dwconv.dwconv.weight', 1, (
        (r'patch_embed(\d)\.proj\.', 'stages.{}.patch_embed.conv.'),
        (r'patch_embed(\d)\.norm\.', 'stages.{}.patch_embed.norm.'),
        (r'block(\d)\.(\d+)\.', r'stages.{}.blocks.\2.'),
        (r'norm(\d)\.', 'stages.{}.norm.'),
    )),
    'timm': Naming('stages.0.blocks.0.mlp.dwconv.weight', 0, (
        (r'patch_embed\.proj\.', 'stages.0.patch_embed.conv.'),
        (r'patch_embed\.norm\.', 'stages.0.patch_embed.norm.'),
        (r'stages\.(\d)\.downsample\.proj\.', 'stages.{}.patch_embed.conv.'),
        (r'stages\.(\d)\.downsample\.norm\.', 'stages.{}.patch_embed.norm.'),
        (r'stages\.(\d)\.blocks\.(\d+)\.', r'stages.{}.blocks.\2.'),
        (r'stages\.(\d)\.norm\.', 'stages.{}.norm.'),
    )),
    'mmdet': Naming('layers.0.1.0.attn.attn.in_proj_weight', 0, (
        (r'layers\.(\d)\.0\.projection\.', 'stages.{}.patch_embed.conv.'),
        (r'layers\.(\d)\.0\.norm\.', 'stages.{}.patch_embed.norm.'),
        (r'layers\.(\d)\.1\.(\d+)\.', r'stages.{}.blocks.\2.'),
        (r'layers\.(\d)\.2\.', 'stages.{}.norm.'),
    )),
}
MMDET_BLOCK = (
    (r'attn\.attn\.in_proj_', 'attn.qkv.'),
    (r'attn\.attn\.out_proj\.', 'attn.proj.'),
    (r'ffn\.layers\.0\.', 'ffn.fc1.'),
    (r'ffn\.layers\.1\.', 'ffn.dwconv.'),
    (r'ffn\.layers\.4\.', 'ffn.fc2.'),
)
# A whole model's; 'timm_model' is that of mmpretrain's wrapper.
PREFIX = re.compile(r'^(module\.)?(backbone\.)?(timm_model\.)?')


def weights_in(checkpoint: dict) -> Weights:
    """The state dict of a file, which has it bare, or as state_dict or model."""
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    return checkpoint


def naming_of(names: Iterable[str]) -> Optional[str]:
    """Whose names these are: a key of `NAMINGS`; None for none of them."""
    bare = {PREFIX.sub('', name) for name in names}
    return next((key for key, naming in NAMINGS.items()
                 if naming.sign in bare), None)


def to_lavit_names(weights: Weights) -> Tuple[Optional[str], Weights]:
    """PVTv2's weights with the names they have in a LaViT without LA layers.

    Prefixes of a whole model are left out, the weights of its head too.

    Args:
        weights (dict): A state dict in any naming of `NAMINGS`; mmpretrain's is
            timm's within ``timm_model``.

    Returns:
        tuple: The key of the naming, None if it is none of them; and the weights,
        which are then as they were.

    Raises:
        ValueError: If a weight of a stage is no tensor with at least one axis.
    """
    key = naming_of(weights)
    if key is None:
        return None, weights
    bare = {PREFIX.sub('', name): x for name, x in weights.items()}
    converted = {}
    for given, x in bare.items():
        name = lavit_name(given, NAMINGS[key])
        if name is None:
            continue
        if name.endswith(('weight', 'bias')):  # batch norms have a counter too
            require(isinstance(x, Tensor) and x.dim() > 0, given, x,
                    'a tensor with at least one axis')
        if '.attn.qkv.' in name:
            q = len(x) // 3
            converted[name.replace('.qkv.', '.q.')] = x[:q]
            converted[name.replace('.qkv.', '.kv.')] = x[q:]
        else:
            # Linear layers are 1x1 convolutions in mmdet.
            linear = re.search(r'ffn\.fc\d\.weight', name)
            converted[name] = x.flatten(1) if linear else x
    return key, converted


def lavit_name(name: str, naming: Naming) -> Optional[str]:
    """The name in LaViT; None for a weight of no stage, such as the head's."""
    for pattern, ours in naming.rules:
        match = re.match(pattern, name)
        if match:
            break
    else:
        return None
    if match.groups():
        ours = ours.replace('{}', str(int(match[1]) - naming.first_stage))
    rest = name[match.end():]
    for pattern, part in (*BLOCK, *MMDET_BLOCK):
        rest = re.sub(f'^{pattern}', part, rest)
    return match.expand(ours) + rest


def for_less_attention(
        weights: Weights,
        less: Sequence[str]) -> Tuple[Weights, List[str]]:
    """Without Q and K of the layers that have none.

    Args:
        weights (dict): With LaViT's names, of VA layers alone.
        less (Sequence[str]): Names of the LA layers, as 'stages.2.blocks.1'.

    Returns:
        tuple: The weights, with v for kv in these layers, and the names of those
        whose q and k are dropped.
    """
    weights, dropped = dict(weights), []
    for layer in less:
        for kind in ('weight', 'bias'):
            q, kv = (f'{layer}.attn.{part}.{kind}' for part in ('q', 'kv'))
            if kv in weights:
                weights[f'{layer}.attn.v.{kind}'] = weights.pop(kv).chunk(2)[1]
                weights.pop(q, None)
                dropped.append(layer)
    return weights, list(dict.fromkeys(dropped))
