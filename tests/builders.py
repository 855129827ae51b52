"""Small models and batches that several test modules use, and tools as functions."""
import contextlib
import gc
import importlib.util
import io
import logging
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Iterator, List
from unittest import mock

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData, PixelData
from torch import nn

ROOT = Path(__file__).parents[1]
ARCH = dict(
    embed_dims=(8, 16, 24, 32),
    depths=(2, 2, 3, 2),
    num_heads=(1, 2, 3, 4),
    num_va_layers=(2, 1, 1, 0))


def randomise(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Weights at which every path of the model matters."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


def small_lavit(**kwargs) -> nn.Module:
    """A LaViT of four stages in eval mode; weights at which everything matters."""
    from mmlavit import LaViT
    return randomise(
        LaViT(**{**dict(arch=ARCH, pretrain_img_size=64), **kwargs})).eval()


def stock_pvt(arch: dict, std: float = 0.1, **kwargs) -> nn.Module:
    """mmdet's PVTv2 of these widths and depths, in float64, with random weights."""
    from mmdet.models.backbones.pvt import PyramidVisionTransformerV2
    model = PyramidVisionTransformerV2(
        embed_dims=arch['embed_dims'][0],  # those of one head, times num_heads
        num_layers=arch['depths'],
        num_heads=arch['num_heads'],
        mlp_ratios=arch['mlp_ratios'],
        **kwargs)
    randomise(model, std)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data += 1  # else all attention is nearly a mean
    return model.double().eval()


def authors_names(pvt: dict) -> dict:
    """mmdet's PVT or PVTv2 weights by the names of the authors' release."""
    parts = {'0.projection': 'patch_embed{}.proj', '0.norm': 'patch_embed{}.norm',
             '2': 'norm{}'}
    layer_parts = {'attn.attn.out_proj': 'attn.proj', 'ffn.layers.0': 'mlp.fc1',
                   'ffn.layers.1': 'mlp.dwconv.dwconv', 'ffn.layers.4': 'mlp.fc2',
                   'ffn.layers.3': 'mlp.fc2'}  # of PVT
    first = int(any('pos_embed' in name for name in pvt))  # before are PVT's positions
    out = {}
    for name, x in pvt.items():
        _, stage, rest = name.split('.', 2)
        stage, (rest, kind) = int(stage) + 1, rest.rsplit('.', 1)
        if kind == 'pos_embed':
            out[f'pos_embed{stage}'] = x
            continue
        if rest in parts:
            out[f'{parts[rest].format(stage)}.{kind}'] = x
            continue
        _, layer, rest = rest.split('.', 2)
        layer = f'block{stage}.{int(layer) - first}'
        if rest == 'attn.attn' and 'in_proj' in kind:
            kind = kind[len('in_proj_'):]
            q, k, v = x.chunk(3)
            out[f'{layer}.attn.q.{kind}'] = q
            out[f'{layer}.attn.kv.{kind}'] = torch.cat([k, v])
            continue
        rest = layer_parts.get(rest, rest)
        linear = kind == 'weight' and '.fc' in rest
        out[f'{layer}.{rest}.{kind}'] = x.flatten(1) if linear else x
    return out


@contextmanager
def logged(level: int = logging.INFO) -> Iterator[List[str]]:
    """What mmengine's logger says at this level and above."""
    messages = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    before = list(logger.handlers)
    # A training of another test may have left its log file, and mmengine writes how
    # weights were initialised to the file alone.
    logger.handlers = [x for x in before if not isinstance(x, logging.FileHandler)]
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.handlers = before


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Autocast, or a skipped test: torch 2.1 has no float16 on CPUs."""
    try:
        with torch.autocast(device, dtype):
            return torch.autocast(device, dtype)
    except RuntimeError as error:
        if hasattr(torch, 'get_autocast_dtype'):  # not in 2.1
            raise
        pytest.skip(str(error))


def images(size: tuple) -> list:
    return [torch.randint(0, 255, (3, *size)).byte() for _ in range(2)]


def detection_batch(model: nn.Module, size: tuple = (96, 128)) -> dict:
    from mmdet.structures import DetDataSample
    samples = []
    for i in range(2):
        sample = DetDataSample(metainfo=dict(
            img_shape=size, ori_shape=size, pad_shape=size,
            scale_factor=(1, 1)))
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[8. + i, 8, 40, 44], [50, 20, 90, 90]]),
            labels=torch.tensor([i, 2]))
        samples.append(sample)
    return model.data_preprocessor(
        dict(inputs=images(size), data_samples=samples), training=True)


def segmentation_batch(model: nn.Module, size: tuple = (96, 128)) -> dict:
    from mmseg.structures import SegDataSample
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        mask = torch.randint(0, model.decode_head.num_classes, (1, *size))
        mask[:, :8] = 255
        sample.gt_sem_seg = PixelData(data=mask)
        samples.append(sample)
    return model.data_preprocessor(
        dict(inputs=images(size), data_samples=samples), training=True)


def classification_batch(model: nn.Module, size: tuple = (64, 64)) -> dict:
    from mmpretrain.structures import DataSample
    samples = [DataSample().set_gt_label(i) for i in (3, 7)]
    return model.data_preprocessor(
        dict(inputs=images(size), data_samples=samples), training=True)


BATCHES = dict(
    mmdet=detection_batch,
    mmseg=segmentation_batch,
    mmpretrain=classification_batch)


# A pipeline for digits_config that draws random numbers
RANDOM_IMAGES = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=40),
    dict(type='RandomCrop', crop_size=32),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs')
]


def digits_config(data, **options):
    """The config of a whole training that takes seconds, on make_digits' data.

    Args:
        data (Path): The folder that tools/make_digits.py made.
        options: As for ``--cfg-options``, with '__' for '.'.
    """
    from mmengine.config import Config
    loader = dict(
        batch_size=8,
        num_workers=0,
        persistent_workers=False,
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
        dataset=dict(
            type='CustomDataset',
            data_root=str(data / 'classes/train'),
            indices=list(range(0, 1440, 45)),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='Resize', scale=32),
                dict(type='PackInputs')
            ]))
    config = Config(
        dict(
            default_scope='mmpretrain',
            custom_imports=dict(
                imports=['mmlavit'], allow_failed_imports=False),
            model=dict(
                type='ImageClassifier',
                backbone=dict(
                    type='LaViT',
                    arch=ARCH,
                    pretrain_img_size=32,
                    out_indices=(3, )),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(
                    type='LinearClsHead',
                    num_classes=10,
                    in_channels=32,
                    topk=(1, ))),
            data_preprocessor=dict(
                num_classes=10,
                mean=[127.] * 3,
                std=[64.] * 3,
                to_rgb=True),
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=3),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
            param_scheduler=dict(type='CosineAnnealingLR'),
            custom_hooks=[dict(type='InvalidLossHook')],
            default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
            randomness=dict(seed=0),
            visualizer=dict(type='UniversalVisualizer')))
    config.merge_from_dict(
        {key.replace('__', '.'): value
         for key, value in options.items()})
    return config


def make_runner(config, work_dir: Path, kind: str = 'Runner', **options):
    """Of a config's training or test, in this process."""
    from mmengine import runner
    config.update(
        work_dir=str(work_dir), experiment_name=uuid.uuid4().hex, **options)
    return getattr(runner, kind).from_cfg(config)


def train(config, work_dir: Path, **options) -> dict:
    """The weights after a training in this process."""
    return make_runner(config, work_dir, **options).train().state_dict()


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def check_mean(drawn: torch.Tensor, expected: torch.Tensor) -> None:
    """That random values vary, and that their mean is the expected one.

    Args:
        drawn (Tensor): (draws, ...), one or several hundred.
        expected (Tensor): (...)
    """
    spread = drawn.std(0) / len(drawn)**.5  # of their mean
    assert (spread > 0).all()
    assert ((drawn.mean(0) - expected).abs() / spread).mean() < 1.5  # if right: .8


def load_tool(name: str, root: Path = ROOT, folder: str = 'tools') -> ModuleType:
    """A tool as a module that other tools can import."""
    spec = importlib.util.spec_from_file_location(name, root / folder / f'{name}.py')
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    # It finds its neighbours, as a script does.
    with mock.patch.object(sys, 'path', [*sys.path, str(root / folder)]):
        spec.loader.exec_module(module)
    return module


def run_tool(name: str, *argv, root: Path = ROOT,
             folder: str = 'tools') -> subprocess.CompletedProcess:
    """A tool in this process, which has imported what another would import first."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with mock.patch.object(sys, 'argv', [f'{name}.py', *map(str, argv)]), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            load_tool(name, root, folder).main()
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):
                print(code, file=err)
                code = 1
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def leave_process_group() -> None:
    """Ends it, no DDP model left: one is in a cycle, and would keep gloo's threads."""
    gc.collect()
    torch.distributed.destroy_process_group()
