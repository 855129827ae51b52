"""Stops training at a loss that is NaN or infinite, while the weights are good."""
from functools import partial
from typing import List, Tuple

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn


@HOOKS.register_module()
class InvalidLossHook(Hook):
    """Stops training at an invalid loss and says where it came from.

    Unlike mmdet's ``CheckInvalidLossHook`` it sees the losses before the
    optimizer does, so that the weights stay as the step before left them, and
    it refuses to save weights that are not finite. In each step it waits for the
    losses, and several ranks exchange one number.
    """

    def before_train(self, runner) -> None:
        model = unwrap(runner.model)
        self.handle = model.register_forward_hook(
            partial(self.check, runner), with_kwargs=True)

    def after_train(self, runner) -> None:
        self.handle.remove()

    def check(self, runner, model: nn.Module, args: tuple, kwargs: dict,
              losses) -> None:
        """Raises FloatingPointError if a loss of this or another rank is invalid."""
        if not model.training or not isinstance(losses, dict):
            return
        # As BaseModel.parse_losses reads them.
        values = {
            name: sum(x.detach().mean() for x in
                      (value if isinstance(value, (list, tuple)) else [value]))
            for name, value in losses.items() if 'loss' in name
        }
        valid = torch.as_tensor(sum(values.values())).isfinite()
        if everywhere(valid):
            return
        # On all ranks: a forward may wait for the others', as with SyncBN.
        seen = observe(model, args, kwargs)
        if valid:
            raise FloatingPointError(
                f'Step {runner.iter + 1}: a loss of another rank is invalid; that '
                "rank's message names it.")
        values = ', '.join(f'{k}={float(v):.4g}' for k, v in values.items())
        raise FloatingPointError(
            f'Step {runner.iter + 1}: {values}. {describe(seen)} The weights were '
            'not changed by this step and nothing was saved; the last checkpoint '
            f'is {runner.message_hub.get_info("last_ckpt", None)}. Check the '
            'data of this step, lower the learning rate, clip gradients '
            '(optim_wrapper.clip_grad) or train in bfloat16, and go on with '
            '--resume.')

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Raises FloatingPointError if a weight is invalid."""
        for name, value in checkpoint['state_dict'].items():
            if isinstance(value, Tensor) and not value.isfinite().all():
                raise FloatingPointError(
                    f'Step {checkpoint["meta"]["iter"]}: the weights {name} are not '
                    'finite, so they were not saved. The checkpoints before '
                    'are as they were; lower the learning rate or clip '
                    'gradients (optim_wrapper.clip_grad), and go on with '
                    '--resume.')


def everywhere(valid: Tensor) -> bool:
    """Whether it is so on all ranks."""
    least = valid.int()
    all_reduce(least, 'min')
    return bool(least)


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


@torch.no_grad()
def observe(model: nn.Module, args: tuple,
            kwargs: dict) -> List[Tuple[str, Tensor]]:
    """Names and outputs' largest absolute values, in the order of a forward."""
    seen = []

    def record(name, module, inputs, output):
        outputs = output if isinstance(output, (list, tuple)) else [output]
        for x in outputs:
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
                seen.append((f'{name} ({str(x.dtype)[6:]})', x.abs().amax()))

    handles = [
        module.register_forward_hook(partial(record, name))
        for name, module in model.named_modules() if name
    ]
    try:
        model.forward(*args, **kwargs)
    except Exception as error:  # the losses' own checks; what was seen counts
        seen.append((f'the forward, which raises {error!r}',
                     torch.tensor(torch.nan)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def describe(seen: List[Tuple[str, Tensor]]) -> str:
    """One sentence on the largest activation and the first that is invalid."""
    finite = [(float(value), name) for name, value in seen
              if value.isfinite()]
    largest = 'There is no finite activation'
    if finite:
        largest = 'The largest activation is {:.4g}, of {}'.format(*max(finite))
    first = next((name for name, value in seen if not value.isfinite()), None)
    return largest + (f'; the first that is not finite is of {first}.'
                      if first else '; all are finite.')
