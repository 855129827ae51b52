"""Which part of LaViT does what: a grid of variants under one budget.

    python tools/ablate.py CONFIG DATA --epochs 30 --seeds 0 1 2 --size 64

Trains every variant (see VARIANTS; ``--only`` chooses) with every seed through
mmpretrain on DATA, a folder with ``train/CLASS/*`` and ``val/CLASS/*`` or
``test/CLASS/*``. CONFIG is a classification config of LaViT, of which the model is
taken, with the DP loss where it has none; images are resized, and for training
cropped and flipped. What is done is skipped, what was cut off resumed. Writes to OUT:

    ablation.md, .csv   accuracy (mean and spread over seeds), parameters, MACs, time
                        of a training step, similarity of attention maps and tokens
    ablation.png        accuracy and similarity

A small data set says little about ImageNet: the table names its data and budget.
"""
import argparse
import csv
import json
import logging
import statistics
import subprocess
import sys
from pathlib import Path
from typing import List, Optional

import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.runner import Runner, load_checkpoint
from tqdm import tqdm

import mmlavit  # noqa: F401  (registers LaViT)
from mmlavit.analysis import Similarity
from mmlavit.building import build_model
from mmlavit.complexity import count_macs
from mmlavit.lavit import resolve_arch
from mmlavit.logs import read_scalars

ROOT = Path(__file__).resolve().parents[1]
# Changes to the config's backbone. A function gets depths and numbers of VA layers.
VARIANTS = {
    'LaViT': {},
    'no DP loss': dict(dp_loss=None),
    'DP loss, margin 1': dict(dp_loss=dict(margin=1.)),
    'DP loss, paper form': dict(dp_loss=dict(form='paper', loss_weight=1e-4)),
    'identity': dict(transform='identity'),
    're-attention': dict(transform='re_attention'),
    'no residual': dict(attn_residual=False),
    'LA one stage earlier': dict(num_va_layers=lambda depths, va: one_earlier(
        depths, va)),
    'LA stages only': dict(num_va_layers=lambda depths, va: [
        d if v else 0 for d, v in zip(depths, va)]),
    'all VA (the twin)': dict(
        num_va_layers=lambda depths, va: list(depths), attn_residual=False,
        dp_loss=None),
}


def one_earlier(depths: List[int], va: List[int]) -> List[int]:
    """Half of the last stage that has VA layers alone becomes LA."""
    va = list(va)
    full = [i for i, (d, v) in enumerate(zip(depths, va)) if d == v and d > 1]
    if full:
        va[full[-1]] = depths[full[-1]] // 2
    return va


def config_arch(backbone: dict) -> dict:
    """The complete arch of a backbone's config."""
    return resolve_arch(backbone.arch, backbone.get('num_va_layers'),
                        backbone.get('sr_ratios', (8, 4, 2, 1)))


def make_config(args, variant: str, seed: int) -> Config:
    """CONFIG with the variant, the data and the budget."""
    config = Config.fromfile(args.config)
    backbone = config.model.backbone
    arch = config_arch(backbone)
    if backbone.get('dp_loss') is None:
        backbone.dp_loss = dict()
    for key, value in VARIANTS[variant].items():
        backbone[key] = (value(arch['depths'], arch['num_va_layers'])
                         if callable(value) else value)
    backbone.pretrain_img_size = args.size
    train, val = args.data / 'train', args.data / 'val'
    if not val.is_dir():
        val = args.data / 'test'
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())
    config.model.head.num_classes = len(classes)
    config.model.train_cfg = None
    config.data_preprocessor.num_classes = len(classes)
    resize = dict(type='Resize', scale=args.size)
    pipeline = [dict(type='LoadImageFromFile'), resize,
                dict(type='PackInputs')]
    augmented = [
        dict(type='LoadImageFromFile'), resize,
        dict(type='RandomCrop', crop_size=args.size, padding=args.size // 8),
        dict(type='RandomFlip', prob=0.5, direction='horizontal'),
        dict(type='PackInputs')
    ]
    for loader, root, steps in (('train_dataloader', train, augmented),
                                ('val_dataloader', val, pipeline)):
        config[loader].pop('dataset')  # update() would merge into it
        config[loader].update(
            batch_size=args.batch_size, num_workers=args.workers,
            persistent_workers=args.workers > 0,
            dataset=dict(type='CustomDataset', data_root=str(root),
                         classes=classes, pipeline=steps))
    config.test_dataloader = config.val_dataloader
    config.val_evaluator = config.test_evaluator = dict(
        type='Accuracy', topk=(1, ))
    config.train_cfg = dict(by_epoch=True, max_epochs=args.epochs,
                            val_interval=args.epochs)
    config.param_scheduler = [
        dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=50),
        dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True,
             end=args.epochs, convert_to_iter_based=True)
    ]
    config.optim_wrapper.optimizer.lr = args.lr
    config.default_hooks.logger.interval = 10
    config.default_hooks.checkpoint = dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=1)
    config.randomness = dict(seed=seed)
    config.work_dir = str(folder(args, variant, seed))
    return config


def folder(args, variant: str, seed: int) -> Path:
    name = ''.join(c if c.isalnum() else '_' for c in variant)
    return args.out / 'runs' / f'{name}-seed{seed}'


def accuracy(work_dir: Path) -> Optional[float]:
    """Top-1 after the last epoch; None if it is not known yet."""
    lines = read_scalars(work_dir) + [
        json.loads(path.read_text())
        for path in sorted(work_dir.glob('test/*/*.json'))
    ]
    values = [line['accuracy/top1'] for line in lines
              if 'accuracy/top1' in line]
    return values[-1] if values else None


def train(args, variant: str, seed: int) -> None:
    """Trains a variant; what is there of the same configuration is resumed."""
    config, work_dir = make_config(args, variant, seed), folder(
        args, variant, seed)
    work_dir.mkdir(parents=True, exist_ok=True)
    # Beside the work directory: mmengine writes one of its own into it.
    path, text = work_dir.with_suffix('.py'), config.pretty_text
    if path.is_file() and path.read_text() != text:
        raise SystemExit(f'{work_dir} is of another configuration or budget: '
                         'give another --out, or remove it')
    path.write_text(text)
    last = work_dir / f'epoch_{args.epochs}.pth'
    commands = (
        ['train.py', path, '--work-dir', work_dir, '--resume'],
        # Where it was cut off between the last checkpoint and its validation.
        ['test.py', path, last, '--work-dir', work_dir / 'test'])
    for name, *arguments in commands:
        if accuracy(work_dir) is not None:
            return
        with open(work_dir / 'train.log', 'a') as log:
            code = subprocess.run(
                [sys.executable, str(ROOT / 'tools' / name),
                 *map(str, arguments)],
                stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            break
    if accuracy(work_dir) is None:
        raise SystemExit(f'{variant}, seed {seed}: training failed; see '
                         f'{work_dir}/train.log. Run this again to go on.')


def mean(values: list) -> Optional[float]:
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None


@torch.no_grad()
def analyse(args, variant: str, seed: int) -> dict:
    """Parameters, MACs, and similarities on validation images."""
    config = make_config(args, variant, seed)
    model = build_model(config).eval()
    work_dir = folder(args, variant, seed)
    load_checkpoint(model, str(work_dir / f'epoch_{args.epochs}.pth'),
                    map_location='cpu')
    similarity = Similarity()
    # Shuffled, so that a few batches hold all classes.
    config.val_dataloader.sampler.shuffle = True
    for i, data in enumerate(Runner.build_dataloader(
            config.val_dataloader, seed=0)):
        if i * args.batch_size >= args.analysed_images:
            break
        inputs = model.data_preprocessor(data, training=False)['inputs']
        with similarity.observe(model):
            model.backbone(inputs)
    layers = similarity.result()['layers']
    # The same layers in every variant: those that are VA in CONFIG.
    base = config_arch(Config.fromfile(args.config).model.backbone)
    is_va = [j < va for depth, va in zip(base['depths'], base['num_va_layers'])
             for j in range(depth)]
    steps = [line['time'] - line['data_time'] for line in read_scalars(work_dir)
             if 'loss' in line]
    return dict(
        params=sum(p.numel() for p in model.parameters()) / 1e6,
        macs=count_macs(model, (args.size, args.size)) / 1e9,
        step=1000 * statistics.median(steps),
        maps=mean([x['map_similarity_to_previous'] for x in layers]),
        va_maps=mean([x['map_similarity_to_previous']
                      for x, va in zip(layers, is_va) if va]),
        tokens=mean([x['token_similarity'] for x in layers]),
        asymmetry=mean([x['asymmetry'] for x in layers]),
        diagonal=mean([x['diagonal_largest'] for x in layers]))


def summarise(args, variants: List[str]) -> List[dict]:
    rows = []
    for variant in tqdm(variants, 'analysing', disable=None):
        top1 = [accuracy(folder(args, variant, seed)) for seed in args.seeds]
        seen = [analyse(args, variant, seed) for seed in args.seeds]
        rows.append(dict(
            variant=variant, scale=scale(args), seeds=len(top1),
            top1=statistics.fmean(top1),
            spread=statistics.stdev(top1) if len(top1) > 1 else None,
            **{key: mean([run[key] for run in seen]) for key in seen[0]}))
    return rows


def scale(args) -> str:
    """What every figure here is of."""
    return (f'{args.data.name} at {args.size} px, {args.epochs} epochs, '
            f'batch {args.batch_size}')


COLUMNS = dict(
    variant='variant', scale='scale', top1='top-1, %', spread='± (std over seeds)',
    params='params, M', macs='MACs, G', step='training step, ms',
    maps='map similarity', va_maps='of the VA layers', tokens='token similarity',
    asymmetry='asymmetry', diagonal='diagonal largest')


def write(args, rows: List[dict]) -> str:
    title = (f'{scale(args)}, AdamW {args.lr:g}, seeds '
             f'{" ".join(map(str, args.seeds))}. Not an ImageNet result.')
    digits = dict(top1=1, spread=1, params=2, macs=3, step=0)

    def text(row, key):
        value = row[key]
        return (value if isinstance(value, str) else '' if value is None else
                f'{value:.{digits.get(key, 3)}f}')

    lines = [' | '.join(['', *COLUMNS.values(), '']).strip(),
             ' | '.join(['', *('---' for _ in COLUMNS), '']).strip()]
    lines += [' | '.join(['', *(text(row, key) for key in COLUMNS), '']).strip()
              for row in rows]
    table = '\n'.join([title, '', *lines, ''])
    (args.out / 'ablation.md').write_text(table)
    with open(args.out / 'ablation.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return table


def plot(args, rows: List[dict]) -> None:
    fig = Figure(figsize=(14, .42 * len(rows) + 1.6))
    axes = fig.subplots(1, 3, sharey=True)
    names = [row['variant'] for row in rows]
    for ax, (key, title) in zip(axes, (
        ('top1', 'top-1, % (mean, std over seeds)'),
        ('maps', 'attention maps: cosine to the layer before'),
        ('tokens', 'tokens: mean pairwise cosine'))):
        errors = [row['spread'] or 0 for row in rows] if key == 'top1' else None
        ax.barh(names, [row[key] or 0 for row in rows], xerr=errors,
                color=['#3b6ea5' if name == 'LaViT' else '#a9bdd2'
                       for name in names])
        low = min(row[key] or 0 for row in rows)
        ax.set_xlim(left=max(0, low - (5 if key == 'top1' else .1)))
        ax.set_title(title, fontsize=11)
        ax.grid(axis='x', alpha=.3)
    axes[0].invert_yaxis()
    fig.suptitle(f'{scale(args)} (not an ImageNet result)', fontsize=11)
    fig.tight_layout()
    fig.savefig(args.out / 'ablation.png', dpi=80)


def parse_args(args: Optional[list]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('data', type=Path)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/ablation'))
    parser.add_argument('--only', nargs='+', choices=list(VARIANTS),
                        default=list(VARIANTS), metavar='VARIANT',
                        help='; '.join(VARIANTS))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--size', type=int, default=64, help='input, pixels')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--analysed-images', type=int, default=256)
    args = parser.parse_args(args)
    if not (args.data / 'train').is_dir():
        parser.error(f'{args.data}: expected a folder with train/CLASS/* and '
                     'val/CLASS/* or test/CLASS/*')
    if not any(path.is_dir() for path in (args.data / 'train').iterdir()):
        parser.error(f'{args.data}/train: no folders in it, expected one a class')
    if not Path(args.config).is_file():
        parser.error(f'{args.config}: no such config')
    if Config.fromfile(args.config).get('default_scope') != 'mmpretrain':
        parser.error(f'{args.config}: expected a classifier\'s config '
                     "(default_scope='mmpretrain')")
    return args


def main(args: Optional[list] = None) -> None:
    args = parse_args(args)
    logging.disable(logging.INFO)
    runs = [(variant, seed) for seed in args.seeds for variant in args.only]
    progress = tqdm(runs, 'training', disable=None)
    for i, (variant, seed) in enumerate(progress, 1):
        progress.set_postfix_str(f'{variant}, seed {seed}')
        train(args, variant, seed)
        top1 = accuracy(folder(args, variant, seed))
        tqdm.write(f'[{i}/{len(runs)}] {variant}, seed {seed}: {top1:.1f} %')
    rows = summarise(args, args.only)
    print(f'\n{write(args, rows)}\n')
    plot(args, rows)
    print(f'written to {args.out}/ablation.md, .csv and .png')


if __name__ == '__main__':
    main()
