"""Official PVTv2 weights as a warm start of a LaViT.

    python tools/convert_pvt.py pvt_v2_b2.pth lavit_s_from_pvt.pth --arch small

takes what both have: patch embeddings, vanilla attention (in less-attention layers
its values and output projection), FFNs and norms. Layers that differ in number are
spread evenly, tensors that differ in size are cropped, or keep their initial values
where PVTv2's is smaller.
Theta, Psi and the cross-stage parts keep their initial values: each less-attention
layer begins by repeating its predecessor's attention. Prints what was not used.

PVTv2 normalises between stages, LaViT only its outputs, so this is a start for
training and not the same function. Detection and segmentation configs take it with

    --cfg-options model.backbone.init_cfg.checkpoint=lavit_s_from_pvt.pth

and classification configs, which begin from nothing, with

    --cfg-options load_from=lavit_s_from_pvt.pth
"""
import argparse
from pathlib import Path
from typing import Dict, Optional, Set, Tuple

import torch
from torch import Tensor

from mmlavit import LaViT
from mmlavit.attention import LessAttention
from mmlavit.checkpoints import load_from_local
from mmlavit.lavit import ARCHS

Weights = Dict[str, Tensor]


def resize(x: Tensor, like: Tensor) -> Tensor:
    """``x`` cropped at the end of each axis; ``like`` where x does not reach.

    Not zeros there: channels that are zero throughout would never learn.
    """
    out = like.clone()
    common = tuple(slice(min(a, b)) for a, b in zip(x.shape, like.shape))
    out[common] = x[common]
    return out


def source_of(name: str, stage: int, layer: Optional[int],
              less: bool) -> Optional[Tuple[str, int]]:
    """PVTv2's name of a tensor and into how many parts it is split.

    None where PVTv2 has no such tensor.
    """
    if layer is None:
        for ours, theirs in (('patch_embed.conv', 'patch_embed{}.proj'),
                             ('patch_embed.norm', 'patch_embed{}.norm')):
            if name.startswith(ours):
                return name.replace(ours, theirs.format(stage + 1)), 1
        return None
    prefix = f'block{stage + 1}.{layer}.'
    if less and name.startswith('attn.v.'):
        return prefix + name.replace('attn.v', 'attn.kv'), 2
    for ours, theirs in (('attn.reduction.conv', 'attn.sr'),
                         ('attn.reduction.norm', 'attn.norm'),
                         ('ffn.dwconv', 'mlp.dwconv.dwconv'),
                         ('ffn.', 'mlp.')):
        if name.startswith(ours):
            return prefix + name.replace(ours, theirs), 1
    if name.startswith(('attn.theta', 'attn.psi')):
        return None
    return prefix + name, 2 if name.startswith('attn.kv.') else 1


def convert(pvt: Weights, model: LaViT) -> Tuple[Weights, Set[str], Set[str]]:
    """PVTv2's weights in the model's names and shapes.

    Returns:
        tuple: The converted weights, the model's names without a source, and
        PVTv2's names that were not used in whole.
    """
    converted, missing, used = {}, set(), {}

    def take(name: str, target: Tensor, source: Optional[Tuple[str, int]]):
        if source is None or source[0] not in pvt:
            missing.add(name)
            return
        x, parts = pvt[source[0]], source[1]
        if parts == 2 and '.attn.v.' in name:
            x = x.chunk(2)[1]
            converted[name] = resize(x, target)
        else:
            converted[name] = torch.cat([
                resize(part, like)
                for part, like in zip(x.chunk(parts), target.chunk(parts))
            ])
        whole = '.attn.v.' not in name and x.shape == target.shape
        used[source[0]] = used.get(source[0], False) or whole

    for i, stage in enumerate(model.stages):
        layers = len({
            key.split('.')[1]
            for key in pvt if key.startswith(f'block{i + 1}.')
        })
        if not layers:
            raise ValueError(f'no block{i + 1}.* in the checkpoint: expected '
                             'official PVTv2 weights (pvt_v2_b*.pth)')
        for name, target in stage.patch_embed.state_dict().items():
            take(f'stages.{i}.patch_embed.{name}', target,
                 source_of(f'patch_embed.{name}', i, None, False))
        if stage.downsample is not None:
            missing |= {f'stages.{i}.downsample.{name}'
                        for name in stage.downsample.state_dict()}
        for j, block in enumerate(stage.blocks):
            layer = round(j * (layers - 1) / max(len(stage.blocks) - 1, 1))
            less = isinstance(block.attn, LessAttention)
            for name, target in block.state_dict().items():
                take(f'stages.{i}.blocks.{j}.{name}', target,
                     source_of(name, i, layer, less))
        if hasattr(model, f'norm{i}'):
            for name, target in getattr(model, f'norm{i}').state_dict().items():
                take(f'norm{i}.{name}', target, (f'norm{i + 1}.{name}', 1))
    unused = {name for name in pvt if not used.get(name)}
    return converted, missing, unused


def main(args: Optional[list] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pvt', type=Path, help='official pvt_v2_b*.pth')
    parser.add_argument('out', type=Path)
    parser.add_argument('--arch', default='small', choices=ARCHS)
    args = parser.parse_args(args)
    torch.manual_seed(0)
    model = LaViT(arch=args.arch)
    model.init_weights()
    try:
        pvt = load_from_local(str(args.pvt), map_location='cpu')
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error))
    pvt = pvt.get('state_dict', pvt)
    try:
        converted, missing, unused = convert(pvt, model)
    except ValueError as error:
        raise SystemExit(f'{args.pvt}: {error}')
    model.load_state_dict(converted, strict=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # The prefix that a classifier's checkpoint has.
    torch.save(
        dict(
            meta=dict(source=args.pvt.name, arch=args.arch),
            state_dict={f'backbone.{k}': v for k, v in converted.items()}),
        args.out)
    print(f'{args.out}: {len(converted)} of {len(model.state_dict())} tensors')
    for title, names in (('initial values kept', missing),
                         ('not used, or only in part', unused)):
        print(f'{title} ({len(names)}):', *sorted(names), sep='\n  ')


if __name__ == '__main__':
    main()
