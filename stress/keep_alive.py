"""Do attention maps stay alive? A narrow ten-layer LaViT on small images.

    python stress/keep_alive.py DATA --seeds 0 1 2
    python stress/keep_alive.py DATA --form bounded --lr 1e-2 --steps 300
    python stress/keep_alive.py DATA --mixing low_rank --lr 1e-2 --steps 300

DATA has class folders of 32 x 32 images in ``train`` and ``test``, such as CIFAR-10's.
Prints accuracy and, by layer, the entropy of the maps (1: uniform, 0: one key), their
asymmetry, the share of rows whose diagonal is the largest, and the deviation of the
scores over keys.
"""
import argparse
import math
from pathlib import Path
from typing import Callable, List, Tuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlavit import LaViT
from mmlavit.analysis.measures import (asymmetry, diagonal_largest, entropy,
                                       score_deviation)
from mmlavit.analysis.observe import observe_layers
from mmlavit.analysis.report import markdown_table
from mmlavit.models.layers.attention import TRANSFORMS
from mmlavit.models.layers.mixing import MIXINGS

ARCH = dict(
    embed_dims=(16, 32, 64, 96), depths=(1, 2, 5, 2), num_heads=(1, 2, 4, 6),
    num_va_layers=(1, 2, 1, 0), strides=(2, 2, 2, 1))


def read(folder: Path) -> Tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32), normalised, and their classes."""
    images, classes = [], []
    for i, name in enumerate(sorted(path.name for path in folder.iterdir())):
        for path in sorted((folder / name).iterdir()):
            images.append(cv2.imread(str(path))[..., ::-1].transpose(2, 0, 1))
            classes.append(i)
    return (torch.tensor(np.stack(images)).float() - 120) / 64, torch.tensor(classes)


def build(twin: bool, seed: int, **options) -> LaViT:
    torch.manual_seed(seed)
    arch = {**ARCH, 'num_va_layers': ARCH['depths']} if twin else ARCH
    model = LaViT(arch=arch, sr_ratios=(4, 2, 1, 1), out_indices=(3, ), **options)
    model.init_weights()
    return model


def train(model: LaViT, head: nn.Module, data: Tuple[Tensor, Tensor], lr: float,
          steps: int, seed: int, falling: float) -> None:
    """``falling``: the weight of the DP loss at the first step, 0 at the last."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *head.parameters()], lr, weight_decay=.05,
        foreach=True)
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = lr * min(1, (step + 1) / 50)
        if falling:
            model.dp_loss.loss_weight = (
                falling * (1 + math.cos(math.pi * step / steps)) / 2)
        chosen = torch.randint(len(data[0]), (64, ), generator=random)
        x = data[0][chosen]
        if torch.rand((), generator=random) < .5:
            x = x.flip(3)
        loss = F.cross_entropy(head(model(x)[0].mean((2, 3))), data[1][chosen])
        if model.dp_loss is not None:
            loss = loss + model.dp_loss.take()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def test(model: LaViT, head: nn.Module, data: Tuple[Tensor, Tensor]) -> dict:
    """Accuracy in percent, and the measures of each layer: a row of the table."""
    layers = []
    model.eval()
    right = sum((head(model(x)[0].mean((2, 3))).argmax(1) == y).sum().item()
                for x, y in zip(data[0].split(250), data[1].split(250)))
    with observe_layers(model, layers.append):
        model(data[0][::max(1, len(data[0]) // 64)][:64])
    maps = [layer.region_map() for layer in layers]

    def by_layer(measure: Callable, of: list, digits: str = '.2f') -> str:
        return ' '.join(f'{measure(x).item():{digits}}' for x in of)

    return {
        'top-1, %': f'{100 * right / len(data[1]):.1f}',
        'entropy by layer': by_layer(entropy, maps),
        'asymmetry': by_layer(asymmetry, maps),
        'diagonal largest': by_layer(diagonal_largest, maps),
        'deviation of scores': by_layer(
            score_deviation, [layer.region_scores() for layer in layers], '.2g'),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, help='folder with train and test')
    parser.add_argument('--form', choices=('preserve', 'bounded', 'paper'),
                        help="the DP loss's; default none; e.g. --form preserve")
    parser.add_argument('--weight', type=float, default=.1,
                        help="the DP loss's; default %(default)s; e.g. --weight 1")
    parser.add_argument('--margin', type=float, default=0.,
                        help='of --form bounded; default %(default)s; e.g. --margin 1')
    parser.add_argument('--decay', action='store_true',
                        help='the weight falls to 0 along a cosine; default off')
    parser.add_argument('--twin', action='store_true',
                        help='all layers VA; default off')
    parser.add_argument('--mixing', choices=MIXINGS, default='full',
                        help='of Theta and Psi; default %(default)s; e.g. --mixing '
                        'low_rank')
    parser.add_argument('--transform', choices=TRANSFORMS, default='token_mix',
                        help='default %(default)s; e.g. --transform re_attention')
    parser.add_argument('--base-size', type=int, default=32,
                        help='of images whose grids Theta and Psi have; default '
                        '%(default)s; e.g. --base-size 16')
    parser.add_argument('--lr', type=float, default=1e-3,
                        help='default %(default)s; e.g. --lr 1e-2')
    parser.add_argument('--steps', type=int, default=600,
                        help='of 64 images; default %(default)s; e.g. --steps 300')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0],
                        help='default 0; e.g. --seeds 0 1 2')
    args = parser.parse_args()
    if args.decay and not args.form:
        parser.error('--decay: expected a DP loss with it, e.g. --form preserve')
    torch.set_num_threads(1)
    data, held_out = read(args.data / 'train'), read(args.data / 'test')
    rows = []
    dp_loss = args.form and dict(
        form=args.form, loss_weight=args.weight, margin=args.margin)
    for seed in args.seeds:
        model = build(args.twin, seed, dp_loss=dp_loss, mixing=args.mixing,
                      transform=args.transform, pretrain_img_size=args.base_size)
        head = nn.Linear(ARCH['embed_dims'][-1], int(data[1].max()) + 1)
        train(model, head, data, args.lr, args.steps, seed,
              args.weight if args.decay else 0)
        rows.append({'seed': seed, **test(model, head, held_out)})
    print(markdown_table(rows))


if __name__ == '__main__':
    main()
