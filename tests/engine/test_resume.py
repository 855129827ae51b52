"""An interrupted training ends as one that was left alone."""
import errno
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import (RANDOM_IMAGES, assert_same, digits_config, make_runner,
                      train)
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import METRICS
from mmengine.runner import Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader

from mmlavit.engine import checkpoint_hook
from mmlavit.engine.checkpoint_hook import CheckpointHook
from mmlavit.engine.optim import merge_checkpoint
from mmlavit.engine.random_states import get_random_states, set_random_states
from mmlavit.engine.safe_loading import load_from_local

SCORES = 0.1, 0.3


@METRICS.register_module()
class Scripted(BaseMetric):
    """A score of each validation, which draws numbers as an inference may."""

    def process(self, data_batch, data_samples) -> None:
        self.results.append(torch.rand(1).item() + np.random.rand())

    def compute_metrics(self, results) -> dict:
        self.calls = getattr(self, 'calls', 0) + 1
        return dict(acc=SCORES[self.calls - 1], loss_val=SCORES[self.calls - 1])


def random_config(digits: Path, workers: int = 0, by_iter: bool = False,
                  validates: bool = True, **options):
    """A training with random crops, flips and drop path, and a validation."""
    if by_iter:
        options.update(
            train_cfg=dict(_delete_=True, by_epoch=False, max_iters=4, val_interval=2),
            train_dataloader__sampler__type='InfiniteSampler',
            default_hooks__checkpoint=dict(
                type='CheckpointHook', interval=2, by_epoch=False))
    else:
        options.update(train_cfg__max_epochs=2)
    config = digits_config(
        digits,
        model__backbone__drop_path_rate=0.3,
        train_dataloader__num_workers=workers,
        train_dataloader__persistent_workers=workers > 0,
        train_dataloader__dataset__pipeline=RANDOM_IMAGES,
        train_dataloader__dataset__indices=list(range(0, 1440, 90)),
        **options)
    if validates:
        config.update(
            val_cfg=dict(),
            val_evaluator=dict(type='Scripted'),
            val_dataloader=dict(
                config.train_dataloader, num_workers=0, persistent_workers=False,
                sampler=dict(type='DefaultSampler')))
    return config


@pytest.mark.parametrize('workers, by_iter', [
    (0, False), (2, False), (0, True), (2, True)])
def test_random_numbers_go_on_where_they_were(workers, by_iter, digits, tmp_path):
    if workers and by_iter and hasattr(_InfiniteDataloaderIterator, 'skip_iter'):
        pytest.skip("OneDL's mmengine skips batches without loading them")
    config = random_config(digits, workers, by_iter)
    whole = train(config, tmp_path / 'whole')
    first = 'iter_2.pth' if by_iter else 'epoch_1.pth'
    # Killed before its validation, which then is not made up for
    (tmp_path / 'parts').mkdir()
    (tmp_path / 'whole' / first).rename(tmp_path / 'parts' / first)
    assert_same(train(config, tmp_path / 'parts', resume=True), whole)


def test_flexible_runner_resumes_the_same_and_refuses_other_weights(digits, tmp_path):
    config = random_config(digits, validates=False, env_cfg=dict())
    options = dict(kind='FlexibleRunner')
    whole = train(config, tmp_path / 'whole', **options)
    (tmp_path / 'parts').mkdir()
    first = (tmp_path / 'whole/epoch_1.pth').rename(tmp_path / 'parts/epoch_1.pth')
    assert_same(train(config, tmp_path / 'parts', resume=True, **options), whole)
    checkpoint = load_from_local(str(first))
    checkpoint['state_dict'].pop('head.fc.weight')
    torch.save(checkpoint, first)
    runner = make_runner(config, tmp_path / 'other', load_from=str(first), resume=True,
                         **options)
    with pytest.raises(ValueError, match='1 weights are missing: head.fc.weight'):
        runner.train()


def test_states_are_data_and_set_all_generators():
    def draw():
        return [random.gauss(0, 1), *np.random.standard_normal(3),
                *torch.randn(3).tolist()]

    draw()  # half of a pair of normal numbers is kept back
    states = get_random_states()
    once = draw()
    set_random_states(states)
    assert draw() == once != draw()


def test_states_of_another_number_of_ranks_are_named():
    """As of a checkpoint that was written before they were kept."""
    for states in ([], [get_random_states()] * 2):
        told = []
        runner = SimpleNamespace(
            optim_wrapper=None, logger=SimpleNamespace(warning=told.append))
        hook = CheckpointHook()
        hook._prepare_to_resume(runner, 'x.pth', dict(random_states=states))
        assert f'generators of {len(states)} ranks, here are 1' in told[0]
        assert hook.states_to_resume is None


# The best checkpoint --------------------------------------------------------
@pytest.mark.parametrize('keys, left', [
    ('acc', {'best_acc_epoch_2.pth'}),
    (['acc', 'loss_val'], {'best_acc_epoch_2.pth', 'best_loss_val_epoch_1.pth'})])
def test_the_best_checkpoint_is_left(keys, left, digits, tmp_path):
    config = random_config(digits, default_hooks__checkpoint=dict(
        type='CheckpointHook', interval=1, save_best=keys))
    train(config, tmp_path)
    assert {path.name for path in tmp_path.glob('best*')} == left


def test_the_better_checkpoint_is_written_before_the_best_is_removed(
        digits, tmp_path, monkeypatch):
    replace = os.replace

    def fail_at_the_better(part, path):
        if path.endswith('best_acc_epoch_2.pth'):
            raise OSError(errno.ENOSPC, 'No space left on device')
        replace(part, path)

    config = random_config(digits, default_hooks__checkpoint=dict(
        type='CheckpointHook', interval=1, save_best='acc'))
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', fail_at_the_better)
        with pytest.raises(OSError, match='No space left'):
            train(config, tmp_path)
    assert [path.name for path in tmp_path.glob('best*')] == ['best_acc_epoch_1.pth']
    assert load_from_local(str(tmp_path / 'best_acc_epoch_1.pth'))['state_dict']
    assert load_from_local(str(tmp_path / 'epoch_2.pth'))['optimizer']


def test_all_ranks_take_the_first_ones_metrics(digits, tmp_path, monkeypatch):
    """Else some would save the best checkpoint and wait for the others."""
    def from_the_first(values):
        values[:] = [dict(values[0], acc=99.)]

    monkeypatch.setattr(checkpoint_hook, 'broadcast_object_list', from_the_first)
    config = random_config(digits, default_hooks__checkpoint=dict(
        type='CheckpointHook', interval=1, save_best='acc'))
    runner = make_runner(config, tmp_path)
    runner.train()
    assert runner.message_hub.get_info('best_score') == 99.


# The optimizer --------------------------------------------------------------
STOCK, MERGED = 'DefaultOptimWrapperConstructor', 'MergedGroupsConstructor'


def groups_config(digits: Path, constructor: str):
    return digits_config(
        digits,
        optim_wrapper=dict(
            constructor=constructor,
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.1),
            paramwise_cfg=dict(
                norm_decay_mult=0., custom_keys=dict(head=dict(lr_mult=10.)))),
        train_cfg__max_epochs=2,
        # Rises again after T_max, by the values of each group that it began with
        param_scheduler=dict(
            type='CosineAnnealingLR', T_max=2, eta_min=1e-5, by_epoch=False))


def test_mmengines_groups_are_taken_up_by_merged_ones(digits, tmp_path):
    """Moments, and the schedule's values of each group."""
    stock = groups_config(digits, STOCK)
    merged = groups_config(digits, MERGED)
    whole = train(stock, tmp_path)
    (tmp_path / 'epoch_2.pth').unlink()
    (tmp_path / 'last_checkpoint').unlink()
    runner = make_runner(merged, tmp_path, resume=True)
    resumed = runner.train().state_dict()
    assert len(runner.optim_wrapper.optimizer.param_groups) == 3
    assert_same(resumed, whole)


class TwoOptimizers(BaseModel):
    """As of a generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleDict(
            {name: torch.nn.Linear(1, 1) for name in ('first', 'second')})

    def forward(self, x, mode: str = 'loss'):
        return x

    def train_step(self, x, optim_wrapper) -> dict:
        for name, part in self.parts.items():
            optim_wrapper[name].update_params(part(x).square().mean())
        return {}


def test_several_optimizers_are_resumed(tmp_path):
    def train_two(**options) -> dict:
        torch.manual_seed(0)
        model = TwoOptimizers()
        config = dict(type='SGD', lr=.1, momentum=.9)
        wrappers = {name: build_optim_wrapper(part, dict(optimizer=config))
                    for name, part in model.parts.items()}
        runner = Runner(
            model, str(tmp_path), train_dataloader=DataLoader(torch.ones(4, 1)),
            train_cfg=dict(by_epoch=True, max_epochs=2), experiment_name=str(options),
            optim_wrapper=OptimWrapperDict(**wrappers), **options)
        return runner.train().state_dict()

    whole = train_two()
    (tmp_path / 'epoch_2.pth').unlink()
    (tmp_path / 'last_checkpoint').unlink()
    assert_same(train_two(resume=True), whole)


def optim_wrapper(constructor: str, **paramwise) -> OptimWrapper:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    wrapper = build_optim_wrapper(model, dict(
        constructor=constructor,
        optimizer=dict(type='AdamW', weight_decay=0.1),
        paramwise_cfg=dict(norm_decay_mult=0., **paramwise)))
    wrapper.update_params(model(torch.randn(3, 2)).square().sum())
    return wrapper


@pytest.mark.parametrize('before, now, paramwise, named', [
    (MERGED, STOCK, {}, 'has 2 groups of 4 parameters, this one 4 of 4'),
    (STOCK, MERGED, dict(bias_decay_mult=0.), 'which now share a group')])
def test_other_groups_are_refused(before, now, paramwise, named):
    checkpoint = dict(optimizer=optim_wrapper(before, **paramwise).state_dict())
    with pytest.raises(ValueError, match='its optimizer') as error:
        merge_checkpoint(checkpoint, optim_wrapper(now))
    assert named in str(error.value)
    assert 'resume with the optim_wrapper it began with' in str(error.value)


def test_each_rank_gets_its_own_random_states(digits, tmp_path, monkeypatch):
    runner = make_runner(digits_config(digits), tmp_path)
    hook = next(x for x in runner.hooks if isinstance(x, CheckpointHook))
    monkeypatch.setattr(checkpoint_hook, 'get_world_size', lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(checkpoint_hook, 'get_rank', lambda: rank)
        hook._prepare_to_resume(runner, 'x.pth', dict(random_states=['first', 'second']))
        assert hook.states_to_resume == ['first', 'second'][rank]
