"""Checkpoints are whole, plain data, and must fit the model."""
import os
import re
import zipfile
from pathlib import Path

import mmengine.hooks
import torch
from mmengine._strategy import DDPStrategy, SingleDeviceStrategy
from mmengine.dist import (all_gather_object, broadcast_object_list, get_rank,
                           get_world_size, is_main_process)
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import (BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop,
                             Runner, find_latest_checkpoint)

from ..utils.weights import load_fitting
from .optim import merge_checkpoint
from .random_states import (SkippedBatches, begin_workers, get_random_states,
                            set_random_states)
from .safe_loading import load_from_local


def as_plain_data(x):
    """Data in Python's own containers and types; methods are left out.

    Tensors stay, arrays become lists, paths text, and what has no such form None.
    """
    if isinstance(x, dict):
        return {key if isinstance(key, int) else str(key): as_plain_data(value)
                for key, value in x.items() if not callable(value)}
    if isinstance(x, tuple):
        return tuple(as_plain_data(value) for value in x)
    if isinstance(x, (list, set, frozenset)):
        return [as_plain_data(value) for value in x]
    if isinstance(x, torch.Tensor):
        return x
    if hasattr(x, 'tolist'):
        return as_plain_data(x.tolist())
    if isinstance(x, os.PathLike):
        return os.fspath(x)
    for kind in (bool, int, float, str, bytes):
        if isinstance(x, kind):
            return kind(x)
    return None


class CheckpointHook(mmengine.hooks.CheckpointHook):
    """Mmengine's, but sure of a whole checkpoint that fits the model.

    - ``max_keep_ckpts=1`` keeps two, for the older one is removed before the
      new one is written; the best one is removed after the better one is written.
    - ``resume`` without a path takes the last whole checkpoint, also where the
      training was killed while its name was written, or its folder was moved.
    - What mmengine puts beside weights is written as plain data, and the first
      checkpoint of a run is read back: one that cannot be loaded again stops the
      training then, and not when it is needed.
    - Weights that a test or a resumed training does not find in the checkpoint
      are an error. Where training only begins with it (``load_from``), it must
      have some of the model's weights.
    - ``resume`` goes on with the random numbers of each rank, and takes up the
      optimizer of a training that began without `MergedGroupsConstructor`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.read_back = False
        self.states_to_save = self.states_to_resume = None
        self.asked_to_keep = self.max_keep_ckpts
        if self.max_keep_ckpts == 1:
            self.max_keep_ckpts = 2

    def before_train(self, runner) -> None:
        """Says how many checkpoints are kept, where that is not as asked."""
        super().before_train(runner)
        if self.asked_to_keep != self.max_keep_ckpts:
            runner.logger.info(
                f'CheckpointHook: max_keep_ckpts={self.asked_to_keep} keeps '
                f'{self.max_keep_ckpts}: a kill while one is written leaves the '
                'other')

    def before_run(self, runner) -> None:
        """Finds the checkpoint to resume from."""
        if not runner._resume or runner._load_from is not None:
            return
        named = find_latest_checkpoint(runner.work_dir)
        here = Path(runner.work_dir)
        for path in [named, here / os.path.basename(named)] if named else []:
            if '://' in str(path) or os.path.isdir(path) or zipfile.is_zipfile(path):
                runner._load_from = str(path)
                return
        # Whatever has a checkpoint's name is whole, but for files from elsewhere
        name = re.compile(r'(\d+)'.join(
            map(re.escape, re.split(r'\{[^}]*\}', self.filename_tmpl))))
        # Numbers alone: a published file has a hash there.
        found = sorted(([*map(int, match.groups())], path) for path in here.iterdir()
                       if (match := name.fullmatch(path.name)))
        whole = [str(path) for _, path in found if zipfile.is_zipfile(path)]
        if whole:
            runner._load_from = whole[-1]
            runner.logger.warning(
                f'{runner.work_dir}/last_checkpoint names no whole file '
                f'({named!r}); resuming from {whole[-1]}')

    def before_train_epoch(self, runner) -> None:
        """Random numbers go on where the resumed training was."""
        loop, states = runner.train_loop, self.states_to_resume
        if isinstance(loop, EpochBasedTrainLoop):
            begin_workers(loop.dataloader, runner.seed, runner.epoch)
        if states is None:
            return
        self.states_to_resume = None
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = SkippedBatches(
                loop.dataloader_iterator, runner.iter, states)
        else:
            set_random_states(states)

    def before_val(self, runner) -> None:
        """Keeps the states of the random generators."""
        self.states_before_val = get_random_states()

    def after_val_epoch(self, runner, metrics) -> None:
        """A resumed training does not repeat a validation: no numbers are drawn."""
        set_random_states(self.states_before_val)
        # Validation losses are each rank's own, but all must save or none.
        first = [metrics]
        broadcast_object_list(first)
        super().after_val_epoch(runner, first[0])

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Turns what is not weights into plain data; adds the random states."""
        if self.states_to_save is not None:
            checkpoint['random_states'] = self.states_to_save
        for key in ('meta', 'param_schedulers'):
            if key in checkpoint:
                checkpoint[key] = as_plain_data(checkpoint[key])
        if 'message_hub' in checkpoint:
            hub = checkpoint['message_hub']
            hub['runtime_info'] = as_plain_data(hub['runtime_info'])

    def _save_best_checkpoint(self, runner, metrics) -> None:
        """Writes the better checkpoint, then removes the one before."""
        if not self.save_best:
            return
        before = self._best_paths()
        self._set_best_paths(dict.fromkeys(before))  # mmengine then removes none
        super()._save_best_checkpoint(runner, metrics)
        better = {key: path for key, path in self._best_paths().items() if path}
        self._set_best_paths({**before, **better})
        if not is_main_process():
            return
        for key in better:
            path = before.get(key)
            if path == better[key]:
                continue
            if path and self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif path and self.file_backend.isdir(path):  # as deepspeed writes
                self.file_backend.rmtree(path)

    def _best_paths(self) -> dict:
        if len(self.key_indicators) == 1:
            return dict(best=self.best_ckpt_path)
        return self.best_ckpt_path_dict

    def _set_best_paths(self, paths: dict) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths['best']
        else:
            self.best_ckpt_path_dict = paths

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        self.states_to_save = all_gather_object(get_random_states())
        super()._save_checkpoint_with_step(runner, step, meta)
        self.states_to_save = None
        if (self.read_back or not is_main_process()
                or not os.path.isfile(self.last_ckpt)):
            return
        self.read_back = True
        try:
            load_from_local(self.last_ckpt, map_location='cpu')
        except ValueError as error:
            raise ValueError(
                f'{error}. This training wrote it just now and could not go on '
                'from it: let its hooks and its optimizer put only tensors and '
                'Python\'s own types into checkpoints') from None

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Refuses a checkpoint that does not fit; prepares to go on with one.

        Raises:
            ValueError: Naming the file and the first mismatches.
        """
        if not (isinstance(runner, Runner)
                or type(runner.strategy) in (SingleDeviceStrategy, DDPStrategy)):
            return  # of FlexibleRunner's other strategies, a rank has shards
        name = runner._load_from or 'the checkpoint'
        weights = checkpoint.get('state_dict', checkpoint)
        if not isinstance(weights, dict) or not any(
                isinstance(value, torch.Tensor) for value in weights.values()):
            raise ValueError(f'{name}: holds no weights, only the keys '
                             f'{list(weights)[:5]}')
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module  # with --tta on several GPUs it has both around it
        try:
            found = load_fitting(model, weights)
        except ValueError as error:  # LaViT's own
            raise ValueError(f'{name}: {error}') from None
        begins = isinstance(runner._train_loop, BaseLoop) and not runner._resume
        # The runner warns of other differences.
        if not (found.fitting if begins else not (found.missing or found.sizes)):
            raise ValueError(
                f'{name}: is not of this model: {len(found.fitting)} of its '
                f'{len(weights)} weights fit the model\'s '
                f'{len(model.state_dict())}; {found.describe()}')
        if runner._resume:
            # mmengine would run it, as a config's code. It writes none itself.
            checkpoint.get('meta', {}).pop('config', None)
            self._prepare_to_resume(runner, name, checkpoint)

    def _prepare_to_resume(self, runner, name: str, checkpoint: dict) -> None:
        ours = runner.optim_wrapper
        # Not of several optimizers, each with its own groups
        if (isinstance(ours, OptimWrapper) and not isinstance(ours, OptimWrapperDict)
                and 'param_groups' in checkpoint.get('optimizer', {})):
            try:
                merge_checkpoint(checkpoint, ours)
            except ValueError as error:
                raise ValueError(f'{name}: {error}') from None
        states = checkpoint.get('random_states', [])
        if len(states) == get_world_size():
            self.states_to_resume = states[get_rank()]
        else:
            runner.logger.warning(
                f'{name}: holds the states of the random generators of {len(states)} '
                f'ranks, here are {get_world_size()}: dropout and augmentation draw '
                'other numbers than without the interruption')


def install() -> None:
    """In place of mmengine's hook of the same name."""
    HOOKS.register_module('CheckpointHook', module=CheckpointHook, force=True)
