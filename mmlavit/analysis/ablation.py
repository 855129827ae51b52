"""Which part of LaViT does what: a grid of variants under one budget."""
import statistics
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
from .training import last_checkpoint, metric_of, progress, set_schedule
from .training import train as train_config


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
    'PVTv2 of these widths': dict(num_va_layers=all_va, attn_residual=False,
                                  trunk_norm=False, dp_loss=None),
    # Controls: how much of an accuracy is due to attention?
    'uniform in the place of LA': dict(num_va_layers=all_va, attn_residual=False,
                                       dp_loss=None),
    'uniform everywhere': dict(num_va_layers=all_va, attn_residual=False,
                               dp_loss=None),
    'ResNet': dict(_delete_=True, type='ResNet', depth=18, base_channels=16,
                   stem_channels=16, out_indices=(3, )),
}
RESNET_CHANNELS = 128  # of its last map


@HOOKS.register_module()
class UniformMaps(Hook):
    """Holds Q at zero in some layers, so that every token attends to all alike.

    Args:
        num_va_layers (Sequence[int]): How many layers of each stage keep their maps.
    """

    def __init__(self, num_va_layers: Sequence[int]) -> None:
        self.num_va_layers = num_va_layers

    def before_train(self, runner) -> None:
        for stage, kept in zip(runner.model.backbone.stages, self.num_va_layers):
            for block in stage.blocks[kept:]:
                for parameter in block.attn.q.parameters():
                    nn.init.zeros_(parameter).requires_grad_(False)


class Grid(NamedTuple):
    """What all variants have in common.

    Args:
        config (Path): Of a model with LaViT. It trains by epochs.
        out (Path): What is written is in its folder ``runs``.
        epochs (int): Of every training.
        data (Path, optional): For a classifier, a folder with ``train/CLASS/*`` and
            ``val/CLASS/*`` or ``test/CLASS/*``, instead of the config's data.
        lr (float, optional): Highest learning rate of the optimizer. Default: None,
            the config's.
        workers (int): Processes that load images.
        size (int): Side of the images of ``data`` in pixels.
        batch_size (int): Of training and validation on ``data``.
        augments (bool): Crops and flips training images of ``data`` at random.
    """
    config: Path
    out: Path
    epochs: int
    data: Optional[Path] = None
    lr: Optional[float] = None
    workers: int = 2
    size: int = 64
    batch_size: int = 64
    augments: bool = True

    def work_dir(self, variant: str, seed: int) -> Path:
        """Of one training."""
        name = ''.join(c if c.isalnum() else '_' for c in variant)
        return self.out / 'runs' / f'{name}-seed{seed}'

    def describe(self) -> str:
        """What every figure here is of."""
        if self.data is None:
            return f'{self.config.stem}, {self.epochs} epochs'
        return (f'{self.data.name} at {self.size} px, {self.epochs} epochs, '
                f'batch {self.batch_size}')


def check_config(path: Path, data: Optional[Path]) -> None:
    """Raises ValueError unless `make_config` can work on it."""
    config = Config.fromfile(path)
    if data is not None and config.get('default_scope') != 'mmpretrain':
        raise ValueError(f"{path}: expected a classifier's config "
                         f"(default_scope='mmpretrain') for the class folders of {data}")
    if config.model.get('backbone', {}).get('type') != 'LaViT':
        raise ValueError(f'{path}: expected a model whose backbone is LaViT')
    if 'max_epochs' not in config.train_cfg:
        raise ValueError(f'{path}: expected a config that trains by epochs '
                         '(train_cfg with max_epochs)')


def make_config(grid: Grid, variant: str, seed: int) -> Config:
    """The grid's config with the variant, the data and the budget."""
    config = Config.fromfile(grid.config)
    arch = arch_of(config.model.backbone)
    set_backbone(config.model, variant, arch)
    if grid.data is not None:
        set_data(config, grid)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.update(num_workers=grid.workers, persistent_workers=grid.workers > 0)
    set_schedule(config, grid.epochs)
    if grid.lr is not None:
        config.optim_wrapper.optimizer.lr = grid.lr
    if variant.startswith('uniform'):
        config.custom_imports.imports = [*config.custom_imports.imports, __name__]
        kept = (arch['num_va_layers'] if variant == 'uniform in the place of LA' else
                [0] * len(arch['depths']))
        config.custom_hooks = [*config.custom_hooks,
                               dict(type='UniformMaps', num_va_layers=kept)]
    config.randomness = dict(seed=seed)
    return config


def set_backbone(model: dict, variant: str, arch: dict) -> None:
    """A variant's; with the DP loss where the config has none."""
    change = dict(VARIANTS[variant])
    if change.pop('_delete_', False):
        model.backbone = change
        model.head.in_channels = RESNET_CHANNELS
        return
    if model.backbone.get('dp_loss') is None:
        model.backbone.dp_loss = dict()
    for key, value in change.items():
        model.backbone[key] = (value(arch['depths'], arch['num_va_layers'])
                               if callable(value) else value)


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
    if config.model.backbone.type == 'LaViT':
        config.model.backbone.pretrain_img_size = grid.size
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
            batch_size=grid.batch_size,
            dataset=dict(type='CustomDataset', data_root=str(root),
                         classes=classes, pipeline=pipeline))
    config.test_dataloader = config.val_dataloader
    config.val_evaluator = config.test_evaluator = dict(
        type='Accuracy', topk=(1, ))


def train(grid: Grid, variant: str, seed: int) -> float:
    """Trains a variant, as `mmlavit.analysis.training.train`; its metric in per cent."""
    return train_config(make_config(grid, variant, seed),
                        grid.work_dir(variant, seed))


@torch.no_grad()
def analyse(grid: Grid, variant: str, seed: int, images: int) -> dict:
    """Parameters, MACs, and similarities on validation images.

    Args:
        images (int): How many, rounded up to whole batches.
    """
    config, work_dir = make_config(grid, variant, seed), grid.work_dir(
        variant, seed)
    model = build_model(config).eval()
    load_checkpoint(model, str(last_checkpoint(config, work_dir)),
                    map_location='cpu')
    similarity = Similarity()
    # Shuffled, so that a few batches hold all classes.
    config.val_dataloader.sampler.shuffle = True
    seen = 0
    for data in Runner.build_dataloader(config.val_dataloader, seed=0):
        inputs = model.data_preprocessor(data, training=False)['inputs']
        with similarity.observe(model):
            model.backbone(inputs)
        seen += len(inputs)
        if seen >= images:
            break
    layers = similarity.result()['layers']
    # The same layers in every variant: those that are VA in the grid's config.
    base = arch_of(Config.fromfile(grid.config).model.backbone)
    is_va = [j < va for depth, va in zip(base['depths'], base['num_va_layers'])
             for j in range(depth)]
    steps = [line['time'] - line['data_time'] for line in read_scalars(work_dir)
             if 'loss' in line]
    return dict(
        params=sum(p.numel() for p in model.parameters()) / 1e6,
        macs=count_macs(model, tuple(inputs.shape[-2:])) / 1e9,
        step=1000 * statistics.median(steps),
        maps=mean([x['map_similarity_to_previous'] for x in layers]),
        va_maps=mean([x['map_similarity_to_previous']
                      for x, va in zip(layers, is_va) if va]),
        tokens=mean([x['token_similarity'] for x in layers]),
        entropy=mean([x['entropy'] for x, va in zip(layers, is_va) if not va]),
        va_entropy=mean([x['entropy'] for x, va in zip(layers, is_va) if va]),
        asymmetry=mean([x['asymmetry'] for x in layers]),
        diagonal=mean([x['diagonal_largest'] for x in layers]),
        entropies=[x['entropy'] for x in layers])


def mean(values: list) -> Optional[float]:
    """Of those that are not None."""
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None


def summarise(grid: Grid, variant: str, seeds: Sequence[int],
              images: int) -> dict:
    """A variant's figures, means over its trainings."""
    config = make_config(grid, variant, seeds[0])
    scores = [progress(config, grid.work_dir(variant, seed)).figures['score']
              for seed in seeds]
    runs = [analyse(grid, variant, seed, images) for seed in seeds]
    entropies = zip(*(run.pop('entropies') for run in runs))
    return dict(
        variant=variant, scale=grid.describe(), seeds=len(scores),
        metric=metric_of(config).title, score=statistics.fmean(scores),
        spread=statistics.stdev(scores) if len(scores) > 1 else None,
        **{key: mean([run[key] for run in runs]) for key in runs[0]},
        entropies=[mean(layer) for layer in entropies])


# Titles and digits of the table's columns.
COLUMNS = dict(
    score=('{metric}, %', 1), spread=('± (std over seeds)', 1),
    params=('params, M', 2), macs=('MACs, G', 3), step=('training step, ms', 0),
    maps=('map similarity', 3), va_maps=('of the VA layers', 3),
    tokens=('token similarity', 3), entropy=('entropy of LA layers', 3),
    va_entropy=('of VA layers', 3), asymmetry=('asymmetry', 3),
    diagonal=('diagonal largest', 3))


def table_rows(summaries: List[dict]) -> List[dict]:
    """Summaries as rows of a table."""
    return [
        dict(variant=row['variant'], scale=row['scale'],
             **{title.format(**row): number(row[key], digits)
                for key, (title, digits) in COLUMNS.items()})
        for row in summaries
    ]


def entropy_rows(summaries: List[dict]) -> List[dict]:
    """Normalised entropy of the maps, layer by layer, as rows of a table."""
    return [
        dict(variant=row['variant'],
             **{f'layer {i}': number(value, 2)
                for i, value in enumerate(row['entropies'])})
        for row in summaries
    ]
