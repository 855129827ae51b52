"""Which part of LaViT does what: a grid of variants under one budget."""
import math
import statistics
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner, load_checkpoint
from torch import nn

from ..models.backbones.arch import resolve_arch
from .building import build_model, read_config, type_name
from .complexity import count_macs, count_parameters
from .logs import read_scalars
from .measures import Similarity
from .report import number
from .training import (from_scratch, last_checkpoint, metric_of, progress,
                       set_schedule)
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


# Changes to the config's backbone without its DP loss; num_va_layers by a rule.
VARIANTS: Dict[str, dict] = {
    'LaViT': {},
    'DP loss': dict(dp_loss=dict()),
    'DP loss, weight 0.01': dict(dp_loss=dict(loss_weight=0.01)),
    'DP loss, weight 1': dict(dp_loss=dict(loss_weight=1.)),
    'DP loss, bounded': dict(dp_loss=dict(form='bounded')),
    'DP loss, margin 1': dict(dp_loss=dict(form='bounded', margin=1.)),
    'DP loss, paper form': dict(dp_loss=dict(form='paper', loss_weight=1e-4)),
    'identity': dict(transform='identity'),
    're-attention': dict(transform='re_attention'),
    'low-rank mixing': dict(mixing='low_rank'),
    'no residual': dict(attn_residual=False),
    'LA one stage earlier': dict(num_va_layers=one_earlier),
    'LA stages only': dict(num_va_layers=stages_only),
    'all VA (the twin)': dict(num_va_layers=all_va, attn_residual=False),
    # Controls: how much of an accuracy is due to attention?
    'uniform in the place of LA': dict(num_va_layers=all_va, attn_residual=False),
    'uniform everywhere': dict(num_va_layers=all_va, attn_residual=False),
    'ResNet': dict(type='ResNet', depth=18, out_indices=(3, )),
}
RESNET_PARAMS = 11.2e6  # of ResNet-18 with 64 channels at first


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
            Default: None.
        lr (float, optional): Highest learning rate of the optimizer. Default: None,
            the config's.
        workers (int): Processes that load images. Default: 2.
        size (int): Side of the images of ``data`` in pixels. Default: 64.
        batch_size (int): Of training and validation on ``data``. Default: 64.
        augments (bool): Crops and flips training images of ``data`` at random.
            Default: True.
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
        return (f'{self.data.name} at {self.size} px ({self.count_keys()} keys), '
                f'{self.epochs} epochs, batch {self.batch_size}')

    def count_keys(self) -> int:
        """The keys of the last stage, for images of ``size``."""
        backbone = Config.fromfile(self.config).model.backbone
        arch = arch_of(backbone)
        stride = math.prod(arch['strides']) * sr_ratios_of(backbone)[-1]
        return math.ceil(self.size / stride)**2


def check_config(path: Path, data: Optional[Path]) -> None:
    """Raises ValueError unless `make_config` can work on it."""
    config = read_config(path)
    if data is not None and config.get('default_scope') != 'mmpretrain':
        raise ValueError(f"{path}: expected a classifier's config "
                         f"(default_scope='mmpretrain') for the class folders of {data}")
    if config.model.get('backbone', {}).get('type') != 'LaViT':
        raise ValueError(f'{path}: expected a model whose backbone is LaViT')
    if 'max_epochs' not in (config.get('train_cfg') or {}):
        raise ValueError(f'{path}: expected a config that trains by epochs '
                         '(train_cfg with max_epochs)')
    arch = arch_of(config.model.backbone)
    if list(arch['num_va_layers']) == list(arch['depths']):
        raise ValueError(f'{path}: expected a LaViT that has less-attention layers, '
                         f"but num_va_layers={arch['num_va_layers']} are all")
    if data is not None:
        return
    check_evaluator(path, config)
    if any(hook.type == 'SwitchRecipeHook' for hook in config.get('custom_hooks', [])):
        raise ValueError(f'{path}: expected a config without SwitchRecipeHook, or data '
                         'of your own beside it')


def check_evaluator(path: Path, config: Config) -> None:
    """Raises ValueError unless the validation gives the toolbox's metric."""
    evaluators = config.get('val_evaluator') or []
    if isinstance(evaluators, dict):
        evaluators = [evaluators]
    expected = metric_of(config).evaluator
    kinds = [type_name(evaluator.type) for evaluator in evaluators]
    if expected not in kinds:
        raise ValueError(f"{path}: val_evaluator {', '.join(kinds) or None}: expected "
                         f'{expected}, by which networks are compared')


def make_config(grid: Grid, variant: str, seed: int) -> Config:
    """The grid's config with the variant, the data and the budget."""
    config = Config.fromfile(grid.config)
    arch = arch_of(config.model.backbone)
    if grid.data is not None:
        set_data(config, grid)
    from_scratch(config)
    set_backbone(config.model, variant, arch)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.update(num_workers=grid.workers, persistent_workers=grid.workers > 0)
    set_schedule(config, grid.epochs)
    if grid.lr is not None:
        config.optim_wrapper.optimizer.lr = grid.lr
    if variant.startswith('uniform'):
        kept = (arch['num_va_layers'] if variant == 'uniform in the place of LA' else
                [0] * len(arch['depths']))
        hold_uniform(config, kept)
    config.randomness = dict(seed=seed)
    return config


def set_backbone(model: dict, variant: str, arch: dict) -> None:
    """A variant's: without a DP loss, unless the variant is one of its forms."""
    if variant == 'ResNet':
        set_resnet(model)
        return
    backbone = model.backbone
    backbone.dp_loss = None
    for key, value in VARIANTS[variant].items():
        backbone[key] = (value(arch['depths'], arch['num_va_layers'])
                         if callable(value) else value)


def set_resnet(model: dict) -> None:
    """A ResNet-18 of as many parameters as the backbone."""
    params = count_parameters(MODELS.build(model.backbone))
    channels = round(64 * (params / RESNET_PARAMS)**.5)
    model.backbone = dict(VARIANTS['ResNet'], base_channels=channels,
                          stem_channels=channels)
    model.head.in_channels = 8 * channels


def hold_uniform(config: Config, num_va_layers: Sequence[int]) -> None:
    """Adds `UniformMaps`."""
    imports = config.get('custom_imports', dict(imports=[]))['imports']
    config.custom_imports = dict(imports=[*imports, __name__],
                                 allow_failed_imports=False)
    config.custom_hooks = [*config.get('custom_hooks', []),
                           dict(type='UniformMaps', num_va_layers=num_va_layers)]


def arch_of(backbone: dict) -> dict:
    """The complete arch of a backbone's config."""
    return resolve_arch(backbone.get('arch', 'small'), backbone.get('num_va_layers'),
                        sr_ratios_of(backbone))


def sr_ratios_of(backbone: dict) -> Sequence[int]:
    """Of a backbone's config."""
    return backbone.get('sr_ratios', (8, 4, 2, 1))


def set_data(config: Config, grid: Grid) -> None:
    """Resized images; for training cropped and flipped, if the grid says so."""
    train, val = grid.data / 'train', grid.data / 'val'
    if not val.is_dir():
        val = grid.data / 'test'
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())
    config.model.backbone.pretrain_img_size = grid.size
    config.model.head.num_classes = len(classes)
    config.model.train_cfg = None
    config.data_preprocessor.num_classes = len(classes)
    config.custom_hooks = [hook for hook in config.get('custom_hooks', [])
                           if hook.type != 'SwitchRecipeHook']  # other images
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
        grid (Grid): Of the training.
        variant (str): One of `VARIANTS`, trained.
        seed (int): Of the training.
        images (int): How many, rounded up to whole batches.

    Returns:
        dict: A number, or None, by name; and by the names of `LAYER_MEASURES` a list
        with one for each layer.
    """
    config, work_dir = make_config(grid, variant, seed), grid.work_dir(
        variant, seed)
    model = build_model(config).eval()
    load_checkpoint(model, str(last_checkpoint(config, work_dir)),
                    map_location='cpu')
    layers, size = look_at_layers(model, config, images)
    # The same layers in every variant: those that are VA in the grid's config.
    base = arch_of(Config.fromfile(grid.config).model.backbone)
    is_va = [j < va for depth, va in zip(base['depths'], base['num_va_layers'])
             for j in range(depth)]
    steps = [line['time'] - line['data_time'] for line in read_scalars(work_dir)
             if 'loss' in line]

    def of_layers(key: str, kinds: Sequence[bool]) -> Optional[float]:
        return mean([x[key] for x, va in zip(layers, is_va) if va in kinds])

    return dict(
        params=count_parameters(model) / 1e6,
        macs=count_macs(model, size) / 1e9,
        step=1000 * statistics.median(steps),
        maps=of_layers('map_similarity_to_previous', (True, False)),
        va_maps=of_layers('map_similarity_to_previous', (True, )),
        tokens=of_layers('token_similarity', (True, False)),
        **{key: of_layers(key, (False, ))
           for key in ('entropy', 'asymmetry', 'diagonal_largest')},
        va_entropy=of_layers('entropy', (True, )),
        layers={key: [x[key] for x in layers] for key in LAYER_MEASURES})


def look_at_layers(model: nn.Module, config: Config,
                   images: int) -> Tuple[List[dict], Tuple[int, int]]:
    """The measures of a model's layers, none without attention; and the images' size."""
    similarity, seen = Similarity(), 0
    # Shuffled, so that a few batches hold all classes.
    config.val_dataloader.sampler.shuffle = True
    for data in Runner.build_dataloader(config.val_dataloader, seed=0):
        inputs = model.data_preprocessor(data, training=False)['inputs']
        size = tuple(inputs.shape[-2:])
        if config.model.backbone.type != 'LaViT':
            return [], size
        with similarity.observe(model):
            model.backbone(inputs)
        seen += len(inputs)
        if seen >= images:
            break
    return similarity.result()['layers'], size


def mean(values: list) -> Optional[float]:
    """Of those that are not None."""
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None


def summarise(grid: Grid, variant: str, seeds: Sequence[int],
              images: int) -> dict:
    """A variant's figures, means over its trainings; see `analyse`."""
    config = make_config(grid, variant, seeds[0])
    scores = [progress(config, grid.work_dir(variant, seed)).figures['score']
              for seed in seeds]
    runs = [analyse(grid, variant, seed, images) for seed in seeds]
    layers = [run.pop('layers') for run in runs]
    return dict(
        variant=variant, scale=grid.describe(), seeds=len(scores),
        metric=metric_of(config).title, score=statistics.fmean(scores),
        spread=statistics.stdev(scores) if len(scores) > 1 else None,
        **{key: mean([run[key] for run in runs]) for key in runs[0]},
        layers={key: [mean(of_runs) for of_runs in zip(*(x[key] for x in layers))]
                for key in LAYER_MEASURES})


# Titles and digits of the table's columns.
COLUMNS = dict(
    score=('{metric}, %', 1), spread=('± (std over seeds)', 1),
    params=('params, M', 2), macs=('MACs, G', 3), step=('training step, ms', 0),
    maps=('map similarity', 3), va_maps=('of the VA layers', 3),
    tokens=('token similarity', 3), entropy=('entropy of LA layers', 3),
    va_entropy=('of VA layers', 3), asymmetry=('asymmetry of LA layers', 3),
    diagonal_largest=('diagonal largest in LA layers', 3))
# What there is a table of by layer.
LAYER_MEASURES = dict(
    entropy='Entropy of the attention maps by layer, 1: uniform, 0: a single key.',
    asymmetry='Asymmetry of the attention maps by layer, 0 to 2.',
    diagonal_largest='Share of rows whose diagonal is the largest, by layer.',
    map_similarity_to_previous='Cosine of the attention map to that of the layer before.',
    token_similarity='Mean cosine of the tokens to each other, by layer.')


def table_rows(summaries: List[dict]) -> List[dict]:
    """Summaries as rows of a table."""
    return [
        dict(variant=row['variant'], scale=row['scale'],
             **{title.format(**row): number(row[key], digits)
                for key, (title, digits) in COLUMNS.items()})
        for row in summaries
    ]


def layer_rows(summaries: List[dict], measure: str) -> List[dict]:
    """One of `LAYER_MEASURES`, layer by layer, as rows of a table."""
    count = max(len(row['layers'][measure]) for row in summaries)
    rows = []
    for row in summaries:
        values = row['layers'][measure]
        values = [*values, *[None] * (count - len(values))]
        rows.append(dict(variant=row['variant'],
                         **{f'layer {i}': number(value, 2)
                            for i, value in enumerate(values)}))
    return rows
