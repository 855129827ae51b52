"""Which part of LaViT does what: a grid of variants under one budget."""
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, load_checkpoint
from torch import nn

from ..models.backbones.arch import resolve_arch
from .building import build_model
from .complexity import count_macs
from .logs import read_scalars
from .measures import Similarity
from .report import number
from .runs import Run, read_run


def one_earlier(depths: List[int], va: List[int]) -> List[int]:
    """Half of the last stage that has VA layers alone becomes LA."""
    va = list(va)
    full = [i for i, (d, v) in enumerate(zip(depths, va)) if d == v and d > 1]
    if full:
        va[full[-1]] = depths[full[-1]] // 2
    return va


def stages_only(depths: List[int], va: List[int]) -> List[int]:
    """No stage has both; one that had is VA."""
    return [d if v else 0 for d, v in zip(depths, va)]


def all_va(depths: List[int], va: List[int]) -> List[int]:
    """No LA layers."""
    return list(depths)


# Changes to the config's backbone; num_va_layers by a rule.
VARIANTS: Dict[str, dict] = {
    'LaViT': {},
    'no DP loss': dict(dp_loss=None),
    'DP loss, bounded': dict(dp_loss=dict(form='bounded')),
    'DP loss, margin 1': dict(dp_loss=dict(form='bounded', margin=1.)),
    'DP loss, paper form': dict(dp_loss=dict(form='paper', loss_weight=1e-4)),
    'identity': dict(transform='identity'),
    're-attention': dict(transform='re_attention'),
    'low-rank mixing': dict(mixing='low_rank'),
    'no residual': dict(attn_residual=False),
    'LA one stage earlier': dict(num_va_layers=one_earlier),
    'LA stages only': dict(num_va_layers=stages_only),
    'all VA (the twin)': dict(num_va_layers=all_va, attn_residual=False,
                              dp_loss=None),
    'uniform maps (a control)': dict(num_va_layers=all_va, attn_residual=False,
                                     dp_loss=None),
}
UNIFORM = 'uniform maps (a control)'


@HOOKS.register_module()
class UniformMaps(Hook):
    """Holds Q at zero, so that every token attends to all alike.

    Shows how much of an accuracy is due to attention.
    """

    def before_train(self, runner) -> None:
        for name, parameter in runner.model.named_parameters():
            if '.attn.q.' in name:
                nn.init.zeros_(parameter).requires_grad_(False)


class Grid(NamedTuple):
    """What all variants have in common.

    Args:
        config (Path): A classification config of LaViT, of which the model is taken.
        data (Path): A folder with ``train/CLASS/*`` and ``val/CLASS/*`` or
            ``test/CLASS/*``.
        out (Path): What is written is in its folder ``runs``.
        epochs (int): Of every training.
        size (int): Side of the images in pixels.
        batch_size (int): Of training and validation.
        lr (float): Highest learning rate of AdamW.
        workers (int): Processes that load images.
        augments (bool): Crops and flips training images at random.
    """
    config: Path
    data: Path
    out: Path
    epochs: int = 30
    size: int = 64
    batch_size: int = 64
    lr: float = 1e-3
    workers: int = 2
    augments: bool = True

    def work_dir(self, variant: str, seed: int) -> Path:
        """Of one training."""
        name = ''.join(c if c.isalnum() else '_' for c in variant)
        return self.out / 'runs' / f'{name}-seed{seed}'

    def describe(self) -> str:
        """What every figure here is of."""
        return (f'{self.data.name} at {self.size} px, {self.epochs} epochs, '
                f'batch {self.batch_size}')


def require_classifier(path: Path) -> None:
    """Raises ValueError unless it is the config of a classifier."""
    if Config.fromfile(path).get('default_scope') != 'mmpretrain':
        raise ValueError(f"{path}: expected a classifier's config "
                         "(default_scope='mmpretrain')")


def make_config(grid: Grid, variant: str, seed: int) -> Config:
    """The grid's config with the variant, the data and the budget."""
    config = Config.fromfile(grid.config)
    set_backbone(config.model.backbone, variant, grid.size)
    set_data(config, grid)
    set_schedule(config, grid)
    if variant == UNIFORM:
        config.custom_imports.imports = [*config.custom_imports.imports, __name__]
        config.custom_hooks = [*config.custom_hooks, dict(type='UniformMaps')]
    config.randomness = dict(seed=seed)
    config.work_dir = str(grid.work_dir(variant, seed))
    return config


def set_backbone(backbone: dict, variant: str, size: int) -> None:
    """A variant's; with the DP loss where the config has none."""
    arch = arch_of(backbone)
    if backbone.get('dp_loss') is None:
        backbone.dp_loss = dict()
    for key, value in VARIANTS[variant].items():
        backbone[key] = (value(arch['depths'], arch['num_va_layers'])
                         if callable(value) else value)
    backbone.pretrain_img_size = size


def arch_of(backbone: dict) -> dict:
    """The complete arch of a backbone's config."""
    return resolve_arch(backbone.arch, backbone.get('num_va_layers'),
                        backbone.get('sr_ratios', (8, 4, 2, 1)))


def set_data(config: Config, grid: Grid) -> None:
    """Resized images; for training cropped and flipped, if the grid says so."""
    train, val = grid.data / 'train', grid.data / 'val'
    if not val.is_dir():
        val = grid.data / 'test'
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())
    config.model.head.num_classes = len(classes)
    config.model.train_cfg = None
    config.data_preprocessor.num_classes = len(classes)
    load = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=grid.size)]
    augment = [
        dict(type='RandomCrop', crop_size=grid.size, padding=grid.size // 8),
        dict(type='RandomFlip', prob=0.5, direction='horizontal')
    ] if grid.augments else []
    pack = [dict(type='PackInputs')]
    for loader, root, pipeline in (
        ('train_dataloader', train, [*load, *augment, *pack]),
        ('val_dataloader', val, [*load, *pack])):
        config[loader].pop('dataset')  # update() would merge into it
        config[loader].update(
            batch_size=grid.batch_size, num_workers=grid.workers,
            persistent_workers=grid.workers > 0,
            dataset=dict(type='CustomDataset', data_root=str(root),
                         classes=classes, pipeline=pipeline))
    config.test_dataloader = config.val_dataloader
    config.val_evaluator = config.test_evaluator = dict(
        type='Accuracy', topk=(1, ))


def set_schedule(config: Config, grid: Grid) -> None:
    """Warm-up and cosine; one validation, at the end."""
    config.train_cfg = dict(by_epoch=True, max_epochs=grid.epochs,
                            val_interval=grid.epochs)
    config.param_scheduler = [
        dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=50),
        dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True,
             end=grid.epochs, convert_to_iter_based=True)
    ]
    config.optim_wrapper.optimizer.lr = grid.lr
    config.default_hooks.logger.interval = 10
    config.default_hooks.checkpoint = dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=1)


def train(grid: Grid, variant: str, seed: int) -> float:
    """Trains a variant; what is there of the same configuration is resumed.

    Returns:
        float: Top-1 after the last epoch, in per cent.

    Raises:
        ValueError: If another configuration was trained there.
        RuntimeError: If the training fails, naming its log.
    """
    config, work_dir = make_config(grid, variant, seed), grid.work_dir(
        variant, seed)
    work_dir.mkdir(parents=True, exist_ok=True)
    # Beside the work directory: mmengine writes one of its own into it.
    path, text = work_dir.with_suffix('.py'), config.pretty_text
    if path.is_file() and path.read_text() != text:
        raise ValueError(f'{work_dir} is of another configuration or budget: '
                         'give another --out, or remove it')
    path.write_text(text)
    log = work_dir / 'train.log'
    if not progress(config, work_dir).complete:
        launch('train', [path, '--work-dir', work_dir, '--resume'], log)
    run = progress(config, work_dir)
    if run.complete and not run.figures:
        # It was cut off between the last checkpoint and its validation.
        last = work_dir / f'epoch_{grid.epochs}.pth'
        launch('test', [path, last, '--work-dir', work_dir / 'test'], log)
    top1 = progress(config, work_dir).figures.get('top1')
    if top1 is None:
        raise RuntimeError(f'{variant}, seed {seed}: training failed; see '
                           f'{work_dir}/train.log. Run this again to go on.')
    return top1


def progress(config: Config, work_dir: Path) -> Run:
    """Of a training, with its top-1 in per cent."""
    return read_run(config, work_dir, dict(top1='accuracy/top1'))


def launch(task: str, arguments: Sequence, log: Path) -> None:
    """Trains or tests in a process of its own; the work directory tells the end."""
    code = f'from mmlavit.launch import main; main({task!r})'
    with open(log, 'a') as file:
        subprocess.run([sys.executable, '-c', code, *map(str, arguments)],
                       stdout=file, stderr=subprocess.STDOUT)


@torch.no_grad()
def analyse(grid: Grid, variant: str, seed: int, images: int) -> dict:
    """Parameters, MACs, and similarities on validation images.

    Args:
        images (int): How many, rounded up to whole batches.
    """
    config, work_dir = make_config(grid, variant, seed), grid.work_dir(
        variant, seed)
    model = build_model(config).eval()
    load_checkpoint(model, str(work_dir / f'epoch_{grid.epochs}.pth'),
                    map_location='cpu')
    similarity = Similarity()
    # Shuffled, so that a few batches hold all classes.
    config.val_dataloader.sampler.shuffle = True
    for i, data in enumerate(Runner.build_dataloader(
            config.val_dataloader, seed=0)):
        if i * grid.batch_size >= images:
            break
        inputs = model.data_preprocessor(data, training=False)['inputs']
        with similarity.observe(model):
            model.backbone(inputs)
    layers = similarity.result()['layers']
    # The same layers in every variant: those that are VA in the grid's config.
    base = arch_of(Config.fromfile(grid.config).model.backbone)
    is_va = [j < va for depth, va in zip(base['depths'], base['num_va_layers'])
             for j in range(depth)]
    steps = [line['time'] - line['data_time'] for line in read_scalars(work_dir)
             if 'loss' in line]
    return dict(
        params=sum(p.numel() for p in model.parameters()) / 1e6,
        macs=count_macs(model, (grid.size, grid.size)) / 1e9,
        step=1000 * statistics.median(steps),
        maps=mean([x['map_similarity_to_previous'] for x in layers]),
        va_maps=mean([x['map_similarity_to_previous']
                      for x, va in zip(layers, is_va) if va]),
        tokens=mean([x['token_similarity'] for x in layers]),
        entropy=mean([x['entropy'] for x, va in zip(layers, is_va) if not va]),
        va_entropy=mean([x['entropy'] for x, va in zip(layers, is_va) if va]),
        asymmetry=mean([x['asymmetry'] for x in layers]),
        diagonal=mean([x['diagonal_largest'] for x in layers]))


def mean(values: list) -> Optional[float]:
    """Of those that are not None."""
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None


def summarise(grid: Grid, variant: str, seeds: Sequence[int],
              images: int) -> dict:
    """A variant's figures, means over its trainings."""
    top1 = [
        progress(make_config(grid, variant, seed),
                 grid.work_dir(variant, seed)).figures['top1'] for seed in seeds
    ]
    runs = [analyse(grid, variant, seed, images) for seed in seeds]
    return dict(
        variant=variant, scale=grid.describe(), seeds=len(top1),
        top1=statistics.fmean(top1),
        spread=statistics.stdev(top1) if len(top1) > 1 else None,
        **{key: mean([run[key] for run in runs]) for key in runs[0]})


# Titles and digits of the table's columns.
COLUMNS = dict(
    top1=('top-1, %', 1), spread=('± (std over seeds)', 1), params=('params, M', 2),
    macs=('MACs, G', 3), step=('training step, ms', 0), maps=('map similarity', 3),
    va_maps=('of the VA layers', 3), tokens=('token similarity', 3),
    entropy=('entropy of LA layers', 3), va_entropy=('of VA layers', 3),
    asymmetry=('asymmetry', 3), diagonal=('diagonal largest', 3))


def table_rows(summaries: List[dict]) -> List[dict]:
    """Summaries as rows of a table."""
    return [
        dict(variant=row['variant'], scale=row['scale'],
             **{title: number(row[key], digits)
                for key, (title, digits) in COLUMNS.items()})
        for row in summaries
    ]
