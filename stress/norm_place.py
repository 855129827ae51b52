"""Where should a stage's norm be: in the trunk, or on the returned map alone?

    python stress/norm_place.py DATA SMALL OUT

DATA and SMALL have class folders of images in ``train`` and ``val`` or ``test``, such as
Tiny-ImageNet's and CIFAR-10's. Trains a narrow LaViT from scratch on DATA with the norm in
both places, then fine-tunes each on SMALL. Run it again to go on where it was cut off.
Prints top-1 of both; OUT/table.md has it too.
"""
import argparse
from pathlib import Path
from typing import Dict, List, Tuple

import torch
from recovery import (ARCH, RATIOS, SIZE, Classifier, Data, Run, read, spread,
                      train)

from mmlavit import LaViT
from mmlavit.analysis.report import markdown_table

PLACES = {'output': False, 'trunk': True}


def read_splits(folder: Path, per_class: int) -> Tuple[Data, Data]:
    """Training and held-out images."""
    held_out = folder / 'val'
    return (read(folder / 'train', per_class),
            read(held_out if held_out.is_dir() else folder / 'test'))


def build(trunk_norm: bool, num_classes: int, seed: int) -> Classifier:
    """LaViT as T, S and B are: less attention in stage 3, nothing else in stage 4."""
    torch.manual_seed(seed)
    arch = dict(ARCH, num_va_layers=(2, 2, 2, 0), attn_residual=True,
                trunk_norm=trunk_norm)
    # Stage 4 has stage 3's grid of keys, for its stride is 1.
    backbone = LaViT(arch, sr_ratios=RATIOS, pretrain_img_size=SIZE,
                     out_indices=(3, ), dp_loss=dict())
    model = Classifier(backbone, num_classes)
    backbone.init_weights()
    return model


def run(place: str, seed: int, splits: Dict[str, Tuple[Data, Data]],
        args: argparse.Namespace) -> List[float]:
    """Top-1 from scratch on the first data set, fine-tuned on the second."""
    accuracies, weights = [], None
    for name, (data, held_out) in splits.items():
        model = build(PLACES[place], len(data.classes.unique()), seed)
        if weights is not None:
            model.backbone.load_state_dict(weights)
        epochs, lr = ((args.epochs, args.lr) if weights is None else
                      (args.tune_epochs, args.tune_lr))
        accuracies.append(
            train(model, Run(f'{place}-seed{seed}-{name}', epochs, lr, seed), data,
                  held_out, args.out)[-1])
        weights = model.backbone.state_dict()
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, help='folder with train and val')
    parser.add_argument('small', type=Path, help='the same, to fine-tune on')
    parser.add_argument('out', type=Path, help='folder for what is written')
    parser.add_argument('--per-class', type=int, default=100,
                        help='images a class of DATA; default %(default)s; '
                        'e.g. --per-class 500')
    parser.add_argument('--epochs', type=int, default=8,
                        help='from scratch; default %(default)s; e.g. --epochs 30')
    parser.add_argument('--lr', type=float, default=1e-3,
                        help='from scratch; default %(default)s; e.g. --lr 5e-4')
    parser.add_argument('--tune-epochs', type=int, default=4,
                        help='default %(default)s; e.g. --tune-epochs 10')
    parser.add_argument('--tune-lr', type=float, default=5e-4,
                        help='default %(default)s; e.g. --tune-lr 1e-4')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2],
                        help='default 0 1 2; e.g. --seeds 0')
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    splits = dict(scratch=read_splits(args.data, args.per_class),
                  tuned=read_splits(args.small, None))
    results = {(place, seed): run(place, seed, splits, args)
               for seed in args.seeds for place in PLACES}
    rows = []
    for place in PLACES:
        scratch, tuned = zip(*(results[place, seed] for seed in args.seeds))
        rows.append({'norm': place, 'from scratch, top-1 %': spread(scratch),
                     'fine-tuned, top-1 %': spread(tuned)})
    table = markdown_table(rows)
    (args.out / 'table.md').write_text(table + '\n')
    print(table)


if __name__ == '__main__':
    main()
