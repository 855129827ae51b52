"""One parameter group per setting, where mmengine makes one per parameter."""
from typing import List, Optional, Union

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedGroupsConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor, with groups of equal settings merged.

    An optimizer updates the parameters of one group together, by few kernels
    (``foreach``, PyTorch's default on GPUs, and ``fused``). mmengine's groups of
    one parameter each leave it nothing to put together. Every parameter keeps its
    settings, so the update is the same; but a checkpoint holds the optimizer's
    state by groups, so resume a training with the constructor it began with.
    Our choice, no part of the paper.

    Args:
        optim_wrapper_cfg (dict): As mmengine's.
        paramwise_cfg (dict, optional): As mmengine's. Defaults to None.

    Raises:
        ValueError: When modules share a parameter and ``bypass_duplicate`` is not
            set; an optimizer would update it once for each of them.
    """

    def add_params(self,
                   params: List[dict],
                   module: nn.Module,
                   prefix: str = '',
                   is_dcn_module: Optional[Union[int, float]] = None) -> None:
        """Appends the groups of ``module`` to ``params``; mmengine calls it."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:  # the recursion is still on its way
            return
        listed = [id(parameter) for group in params for parameter in group['params']]
        if len(listed) != len(set(listed)):
            raise ValueError(
                f'paramwise_cfg={self.paramwise_cfg}: modules of {type(module).__name__} '
                'share parameters: set paramwise_cfg.bypass_duplicate=True')
        merged = {}
        for group in params:
            own = tuple(sorted(
                (key, repr(value)) for key, value in group.items() if key != 'params'))
            merged.setdefault(own, {**group, 'params': []})
            merged[own]['params'] += group['params']
        params[:] = merged.values()
