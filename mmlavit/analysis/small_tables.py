"""The paper's three tables on scanned digits, with small networks, trained on a CPU."""
import statistics
from pathlib import Path
from typing import Dict, NamedTuple, Optional, Sequence, Tuple

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from .building import build_model
from .complexity import count_macs, count_parameters
from .peers import lavit, twin
from .report import number
from .training import from_scratch, metric_of, set_schedule, train


class Network(NamedTuple):
    """A backbone and the channels of its four maps."""
    backbone: dict
    channels: Sequence[int]


# Of about LaViT-N's cost. PVT and PVTv2 are mmdet's classes without less attention, in
# the form of ours that equals them, for mmpretrain's necks refuse mmdet's lists.
NETWORKS: Dict[str, Network] = {
    'LaViT-N': Network(lavit('nano'), (32, 64, 128, 192)),
    'LaViT-N, DP loss': Network(lavit('nano', dp_loss=dict()), (32, 64, 128, 192)),
    'LaViT-N, bounded DP loss': Network(
        lavit('nano', dp_loss=dict(form='bounded')), (32, 64, 128, 192)),
    'LaViT-N, identity': Network(
        lavit('nano', transform='identity'), (32, 64, 128, 192)),
    'LaViT-N, Re-Attention': Network(
        lavit('nano', transform='re_attention'), (32, 64, 128, 192)),
    'its all-VA twin': Network(twin('nano'), (32, 64, 128, 192)),
    'PVT': Network(
        dict(type='LessAttentionPVT', embed_dims=32, num_layers=[2, 2, 2, 2],
             num_va_layers=(2, 2, 2, 2), drop_path_rate=0.), (32, 64, 160, 256)),
    'PVTv2-B0': Network(
        lavit('pvtv2_b0', num_va_layers=(2, 2, 2, 2)), (32, 64, 160, 256)),
    'Swin': Network(
        dict(type='mmpretrain.SwinTransformer', out_indices=(0, 1, 2, 3),
             drop_path_rate=0., pad_small_map=True, window_size=4,
             init_cfg=[  # as its configs have it, for the whole classifier
                 dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.),
                 dict(type='Constant', layer='LayerNorm', val=1., bias=0.)],
             arch=dict(embed_dims=32, depths=[2, 2, 4, 2], num_heads=[1, 2, 4, 8])),
        (32, 64, 128, 256)),
    'ResNet-18, half the width': Network(
        dict(type='mmdet.ResNet', depth=18, base_channels=32, norm_eval=False),
        (32, 64, 128, 256)),
}


class Task(NamedTuple):
    """A form of the data set."""
    title: str
    config: str  # in configs
    size: int  # of the images, in pixels
    epochs: int
    lr: Optional[float] = None  # None: the config's


# Not all networks learn with the classifier's own 1e-3, which is for a start from weights:
# this is the rate of lavit_n_tin100.py for its batch. Of its own 20 epochs they would spend
# up to half at chance. After 3 of 6 LaViT-N's segmentor finds little but background.
# Detectors learn in 3 of 6.
TASKS = dict(
    classification=Task('classification', 'lavit_n_digits.py', 64, 60, 2.5e-4),
    detection=Task('RetinaNet', 'retinanet_lavit_n_digits.py', 160, 3),
    segmentation=Task('Semantic FPN', 'semantic_fpn_lavit_n_digits.py', 160, 6))


def make_config(configs: Path, task: str, network: str, seed: int) -> Config:
    """The task's config with another backbone, from scratch, validated at the end."""
    config = Config.fromfile(configs / TASKS[task].config)
    backbone, channels = NETWORKS[network]
    from_scratch(config)
    model = config.model
    model.backbone = dict(backbone)
    if backbone['type'] in ('LaViT', 'LessAttentionPVT'):
        model.backbone.pretrain_img_size = TASKS[task].size
    if 'in_channels' in model.neck:
        model.neck.in_channels = list(channels)
    else:
        model.head.in_channels = channels[-1]
    config.custom_imports.imports = ['mmlavit', 'mmlavit.models.backbones.la_pvt',
                                     'mmdet.models', 'mmpretrain.models']
    import_modules_from_strings(**config.custom_imports)
    if TASKS[task].lr is not None:
        config.optim_wrapper.optimizer.lr = TASKS[task].lr
    set_schedule(config, TASKS[task].epochs)
    config.randomness = dict(seed=seed)
    return config


def work_dir(out: Path, task: str, network: str, seed: int) -> Path:
    """Of one training."""
    name = ''.join(c if c.isalnum() else '_' for c in network)
    return out / 'runs' / f'{task}-{name}-seed{seed}'


def train_network(configs: Path, out: Path, task: str, network: str,
                  seed: int) -> float:
    """The metric in per cent; see `mmlavit.analysis.training.train`."""
    return train(make_config(configs, task, network, seed),
                 work_dir(out, task, network, seed))


def summarise(scores: Sequence[float]) -> str:
    """Mean and standard deviation, as far as there are any."""
    if not scores:
        return ''
    spread = f' ± {statistics.stdev(scores):.1f}' if len(scores) > 1 else ''
    return f'{statistics.fmean(scores):.1f}{spread}'


def describe(tasks: Sequence[str]) -> str:
    """The data and the budget of some tasks."""
    budgets = (f'{TASKS[task].title} at {TASKS[task].size} px, {TASKS[task].epochs} epochs'
               for task in tasks)
    return f'Made digits: {"; ".join(budgets)}'


def make_row(configs: Path, network: str, tasks: Sequence[str],
             scores: Dict[Tuple[str, str, int], float]) -> Dict[str, str]:
    """A network's scores, means and standard deviations over seeds, and its cost.

    Args:
        configs (Path): The folder of configs.
        network (str): One of `NETWORKS`.
        tasks (Sequence[str]): Some of `TASKS`.
        scores (Dict[Tuple[str, str, int], float]): By task, network and seed, in per
            cent; those of trainings that failed are not in it.
    """
    row = dict(network=network)
    for task in tasks:
        config = make_config(configs, task, network, seed=0)
        model = build_model(config)
        size = TASKS[task].size
        row[f'{TASKS[task].title}: {metric_of(config).title}, %'] = summarise(
            [score for (of, name, _), score in scores.items()
             if (of, name) == (task, network)])
        row[f'{TASKS[task].title}: params, M'] = number(
            count_parameters(model) / 1e6, 2)
        row[f'{TASKS[task].title}: MACs, G'] = number(
            count_macs(model, (size, size)) / 1e9, 2)
    return row
