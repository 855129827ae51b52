"""The three small tables: their configs, without their trainings."""
import os
import signal
from pathlib import Path

import pytest
from mmengine.config import Config

from builders import BATCHES
from mmlavit.analysis import training
from mmlavit.analysis.building import build_model
from mmlavit.analysis.complexity import count_macs
from mmlavit.analysis.small_tables import (NETWORKS, TASKS, describe, make_config,
                                           make_row, train_network)

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('network', NETWORKS)
def test_every_network_learns_every_task(task, network):
    config = make_config(CONFIGS, task, network, seed=0)
    assert config.train_cfg.val_interval == config.train_cfg.max_epochs
    model = build_model(config).train()
    model.init_weights()
    losses = model(**BATCHES[config.default_scope](model, (64, 64)), mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    # All maps are of use: gradients reach the backbone's first and last weights.
    first, *_, last = (p for p in model.backbone.parameters() if p.requires_grad)
    assert first.grad.any() and last.grad.any()
    assert ('loss_dp' in losses) == ('DP loss' in network)


@pytest.mark.parametrize('task', ['classification', 'detection'])
def test_networks_cost_about_the_same(task):
    """The backbones; necks and heads are the same."""
    size = TASKS[task].size
    costs = {}
    for name in NETWORKS:
        model = build_model(make_config(CONFIGS, task, name, 0)).backbone
        costs[name] = count_macs(model, (size, size))
    assert max(costs.values()) < 1.5 * costs['LaViT-N'], costs
    assert min(costs.values()) > costs['LaViT-N'] / 1.5, costs


def test_classifiers_have_the_rate_of_the_pre_training_for_their_batch():
    config = make_config(CONFIGS, 'classification', 'Swin', 0)
    pre_training = Config.fromfile(CONFIGS / 'lavit_n_tin100.py')
    ratio = (config.train_dataloader.batch_size
             / pre_training.train_dataloader.batch_size)
    assert config.optim_wrapper.optimizer.lr == (
        pre_training.optim_wrapper.optimizer.lr * ratio)


def test_no_network_drops_paths():
    for name in NETWORKS:
        model = build_model(make_config(CONFIGS, 'classification', name, 0))
        rates = [module.drop_prob for module in model.modules()
                 if hasattr(module, 'drop_prob')]
        assert not any(rates), name


def test_trains_what_is_missing_and_reads_the_rest(tmp_path, monkeypatch):
    """With a stand-in for the process that trains."""
    launched = []

    def listen(task, arguments, log):
        launched.append(Config.fromfile(arguments[0]).randomness.seed)
        folder = Path(arguments[arguments.index('--work-dir') + 1])
        (folder / '1/vis_data').mkdir(parents=True)
        (folder / '1/vis_data/scalars.json').write_text(
            '{"mIoU": %d, "step": 6}' % (40 + 2 * launched[-1]))
        (folder / 'last_checkpoint').write_text('epoch_6.pth')

    monkeypatch.setattr(training, 'launch', listen)
    arguments = CONFIGS, tmp_path, 'segmentation', 'LaViT-N'
    assert [train_network(*arguments, seed) for seed in (0, 1, 0)] == [40, 42, 40]
    assert launched == [0, 1]
    scores = {('segmentation', 'LaViT-N', 0): 40., ('segmentation', 'LaViT-N', 1): 42.,
              ('segmentation', 'PVT', 0): 10., ('detection', 'LaViT-N', 0): 20.}
    row = make_row(CONFIGS, 'LaViT-N', ['segmentation', 'classification'], scores)
    assert row['Semantic FPN: mIoU, %'] == '41.0 ± 1.4'
    assert row['classification: top-1, %'] == ''
    assert describe(['segmentation']) == (
        'Made digits: Semantic FPN at 160 px, 6 epochs')


def test_a_detector_that_finds_nothing_scores_0(tmp_path, monkeypatch):
    """mmdet's metric then has no figure, in validation and test."""
    def listen(task, arguments, log):
        work_dir = Path(arguments[arguments.index('--work-dir') + 1])
        if task == 'train':
            (work_dir / 'last_checkpoint').write_text('epoch_3.pth')
        else:
            (work_dir / '1').mkdir(parents=True)
            (work_dir / '1/1.json').write_text('{"time": 0.1}')

    monkeypatch.setattr(training, 'launch', listen)
    assert train_network(CONFIGS, tmp_path, 'detection', 'PVT', 0) == 0


def test_a_training_that_outlives_its_tool_keeps_others_out(tmp_path, monkeypatch):
    script = tmp_path / 'python'
    script.write_text(f'#!/bin/sh\nsleep 60 & echo $! > {tmp_path}/pid\n')
    script.chmod(0o755)
    monkeypatch.setattr(training.sys, 'executable', str(script))
    with training.alone(tmp_path):
        training.launch('train', [], tmp_path / 'log')
    with pytest.raises(RuntimeError, match='another process trains there'):
        with training.alone(tmp_path):
            pass
    os.kill(int((tmp_path / 'pid').read_text()), signal.SIGKILL)
