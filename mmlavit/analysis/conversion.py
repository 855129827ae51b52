"""A trained ViT, PVT or Swin with less attention: what it loses, gains and saves."""
import copy
import importlib
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn

from ..plugins.add import REGISTERED, module_of_itself
from ..plugins.choose import choose, layer_similarities
from ..utils.checks import require
from .building import registered
from .complexity import count_parameters
from .report import number
from .timing import Spread, speed_ratio, time_in_turn


class Conversion(NamedTuple):
    """How a trained model is converted and trained on.

    Args:
        layers (Sequence[int] | None): The layers, counted from 0; None: chosen.
        num_layers (int, optional): Choose no more.
        min_similarity (float): Of a map to the one before, to be chosen.
        mixing (str): 'full' or 'low_rank'.
        epochs (int): Of fine-tuning; 0: none.
        lr (float): Learning rate at the begin of fine-tuning; it falls to 0.
        rounds (int): In which both are timed; 0: they are not.
        control (bool): Fine-tunes the stock model as long, too.
        seed (int, optional): Of all runs; None: as the config says.
    """
    layers: Optional[Sequence[int]]
    num_layers: Optional[int]
    min_similarity: float
    mixing: str
    epochs: int
    lr: float
    rounds: int
    control: bool = False
    seed: Optional[int] = None


def convert_and_tune(config: Config, checkpoint: str, out: Path,
                     how: Conversion) -> List[dict]:
    """Accuracy before, after conversion and after fine-tuning, as rows of a table.

    The converted model is built first, so that layers that cannot inherit are refused
    before anything is tested or trained.

    Args:
        config (Config): Of the trained model, with epochs as its measure of training.
        checkpoint (str): Its weights.
        out (Path): Where the converted config, logs and weights are written.
        how (Conversion): What is done.

    Raises:
        ValueError: If the config's backbone cannot be given less attention in these
            layers, or it is to be trained on and the config has no training of epochs.
    """
    train_cfg = config.get('train_cfg')
    require(not how.epochs or 'max_epochs' in (train_cfg or {}), 'train_cfg', train_cfg,
            'a config with a training of max_epochs, or epochs=0')
    config = copy.deepcopy(config)
    config.load_from, config.resume = checkpoint, False
    if how.seed is not None:
        config.randomness = dict(config.get('randomness', {}), seed=how.seed)
    stock = make_runner(config, out / 'stock')
    layers = choose_layers(stock, how) if how.layers is None else how.layers
    less = with_less_attention(config, layers, how.mixing)
    converted = make_runner(less, out / 'converted')
    less.dump(out / 'config.py')
    rows = [row('trained', stock, stock.test())]
    if how.control and how.epochs:
        control = make_runner(for_tuning(config, how), out / 'control')
        control.train()
        rows.append(row(f'trained on, {how.epochs} epochs', control, control.test()))
    stock_rows = len(rows)
    rows.append(row('converted', converted, converted.test()))
    if how.epochs:
        tuned = make_runner(for_tuning(less, how), out / 'tuned')
        tuned.train()
        rows.append(row(f'fine-tuned, {how.epochs} epochs', tuned, tuned.test()))
    if how.rounds:
        add_times(rows, stock_rows, stock, converted, how.rounds)
    return rows


def choose_layers(stock: Runner, how: Conversion) -> List[int]:
    """The layers of a trained model that are most like those before; prints them.

    Raises:
        ValueError: If none is similar enough.
    """
    stock.load_or_resume()
    found = layer_similarities(stock.model.backbone, some_images(stock))
    layers = choose(found, how.num_layers, how.min_similarity)
    print('chosen:', *(f'{i} ({found[i]:.3f} alike)' for i in layers))
    return layers


def with_less_attention(config: Config, layers: Sequence[int], mixing: str) -> Config:
    """The config with the registered class of less attention as its backbone.

    Raises:
        ValueError: If there is none for its backbone.
    """
    init_default_scope(config.default_scope)
    stock = registered(MODELS, config.model.backbone.type)
    module = stock and module_of_registered(stock)
    require(module is not None, 'model.backbone.type', config.model.backbone.type,
            'VisionTransformer or SwinTransformer of mmpretrain, or '
            'PyramidVisionTransformer or SwinTransformer of mmdet, and not a class that '
            "inherits from them; PVTv2 is served by LaViT's presets pvtv2_b0 to pvtv2_b5")
    config = copy.deepcopy(config)
    module_path = f'mmlavit.models.backbones.{module}'
    imports = config.get('custom_imports', dict(imports=[]))['imports']
    config.custom_imports = dict(
        imports=[*imports, module_path], allow_failed_imports=False)
    importlib.import_module(module_path)
    backbone = config.model.backbone
    for name in ('first_la_layer', 'num_va_layers'):  # where it is such a class already
        backbone.pop(name, None)
    backbone.update(type=REGISTERED[module], la_layers=list(layers), mixing=mixing)
    return config


def module_of_registered(cls: type) -> Optional[str]:
    """The module in ``mmlavit.models.backbones`` with a class's registered counterpart.

    Classes that inherit from a stock class have none: they would become another network.
    """
    own = cls.__module__.rpartition('.')[2]
    module = own if REGISTERED.get(own) == cls.__name__ else module_of_itself(cls)
    return module if module in REGISTERED else None


def for_tuning(config: Config, how: Conversion) -> Config:
    """The config with a short training, whose learning rate falls to 0."""
    config = copy.deepcopy(config)
    config.train_cfg.update(max_epochs=how.epochs, val_interval=how.epochs)
    config.optim_wrapper.optimizer.lr = how.lr
    config.param_scheduler = [dict(
        type='CosineAnnealingLR', T_max=how.epochs, by_epoch=True,
        convert_to_iter_based=True)]
    return config


def make_runner(config: Config, work_dir: Path) -> Runner:
    config = copy.deepcopy(config)
    config.work_dir = str(work_dir)
    config.experiment_name = f'{work_dir.name}_{time.time_ns()}'
    return Runner.from_cfg(config)


def some_images(runner: Runner) -> Tensor:
    """The first batch of the test, as the backbone is given it."""
    data = next(iter(runner.test_dataloader))
    return runner.model.data_preprocessor(data)['inputs']


def row(title: str, runner: Runner, metrics: Dict[str, float]) -> dict:
    params = count_parameters(runner.model)
    return {'model': title, **{name: number(value, 2) for name, value in metrics.items()},
            'parameters, M': number(params / 1e6, 2)}


def add_times(rows: List[dict], stock_rows: int, stock: Runner, converted: Runner,
              rounds: int) -> None:
    """Time of the backbones on a batch, in turn, and the ratio of their speeds.

    The first ``stock_rows`` rows are of the stock model.
    """
    images = some_images(stock)

    def step(model: nn.Module):
        def infer() -> None:
            with torch.no_grad():
                model(images)
        model.eval()
        return infer

    times = time_in_turn(
        dict(stock=step(stock.model.backbone), less=step(converted.model.backbone)),
        rounds, 3, images.device.type)
    ratio = speed_ratio(times['stock'], times['less'])
    for i, each in enumerate(rows):
        seconds = Spread.of(times['less' if i >= stock_rows else 'stock']).median
        each['backbone, ms'] = number(1e3 * seconds, 1)
        each['speed ratio'] = (f'{ratio.median:.2f} ({ratio.p10:.2f}-{ratio.p90:.2f})'
                               if i >= stock_rows else '1.00')
