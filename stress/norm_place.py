"""Where should a stage's norm be: in the trunk, or on the returned map alone?

    python stress/norm_place.py DATA OUT --pvt RECOVERY/stock.pth

DATA has class folders of images in ``train`` and ``val`` or ``test``, such as CIFAR-10's.
Trains a narrow LaViT with the norm in both places: from scratch, and from the PVTv2 that
stress/recovery.py has trained. Run it again to go on where it was cut off. Prints top-1 of
both; OUT/table.md has it too.
"""
import argparse
from pathlib import Path
from typing import Dict, Optional

import torch
from recovery import (ARCH, RATIOS, SIZE, VA_LAYERS, Classifier, Run, read,
                      spread, train)

from mmlavit import LaViT
from mmlavit.analysis.report import markdown_table

PLACES = {'on the returned map': False, 'in the trunk': True}


def build(trunk_norm: bool, num_classes: int, seed: int,
          pvt: Optional[Dict[str, torch.Tensor]]) -> Classifier:
    """From scratch as T, S and B are: LA in stage 3, and nothing else in stage 4.

    From PVTv2's weights: in its layout, with six LA layers.
    """
    torch.manual_seed(seed)
    own = dict(num_va_layers=(2, 2, 2, 0), attn_residual=True)
    arch = dict(ARCH, **(dict(num_va_layers=VA_LAYERS[6]) if pvt else own))
    # Stage 4 has stage 3's grid of keys, for its stride is 1.
    backbone = LaViT(dict(arch, trunk_norm=trunk_norm), sr_ratios=RATIOS,
                     pretrain_img_size=SIZE, out_indices=(3, ), dp_loss=dict())
    model = Classifier(backbone, num_classes)
    backbone.init_weights()
    if pvt:
        backbone.load_state_dict(dict(pvt), strict=False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, help='folder with train and val or test')
    parser.add_argument('out', type=Path, help='folder for what is written')
    parser.add_argument('--pvt', type=Path, required=True,
                        help='stock.pth of stress/recovery.py; e.g. --pvt out/stock.pth')
    parser.add_argument('--epochs', type=int, default=5,
                        help='from scratch; default %(default)s; e.g. --epochs 30')
    parser.add_argument('--lr', type=float, default=1e-3,
                        help='from scratch; default %(default)s; e.g. --lr 5e-4')
    parser.add_argument('--tune-epochs', type=int, default=2,
                        help='from PVTv2; default %(default)s; e.g. --tune-epochs 10')
    parser.add_argument('--tune-lr', type=float, default=5e-4,
                        help='from PVTv2; default %(default)s; e.g. --tune-lr 1e-4')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2],
                        help='default 0 1 2; e.g. --seeds 0')
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    data = read(args.data / 'train')
    held_out = args.data / 'val'
    held_out = read(held_out if held_out.is_dir() else args.data / 'test')
    pvt = {name.partition('.')[2]: x for name, x in torch.load(args.pvt)['model'].items()
           if name.startswith('backbone.')}
    starts = {'from scratch': (None, args.epochs, args.lr),
              'from PVTv2': (pvt, args.tune_epochs, args.tune_lr)}
    rows = []
    for place, trunk_norm in PLACES.items():
        row = {'norm': place}
        for start, (weights, epochs, lr) in starts.items():
            row[f'{start}, top-1 %'] = spread([
                train(build(trunk_norm, len(data.classes.unique()), seed, weights),
                      Run(f'{place}, {start}, seed {seed}', epochs, lr, seed), data,
                      held_out, args.out)[-1] for seed in args.seeds
            ])
        rows.append(row)
    table = markdown_table(rows)
    (args.out / 'table.md').write_text(table + '\n')
    print(table)


if __name__ == '__main__':
    main()
