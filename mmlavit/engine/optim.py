"""One parameter group per setting, where mmengine makes one per parameter."""
from typing import List, Optional, Union

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

# What mmengine's schedules hold a list of, with a value for each group
OF_EACH_GROUP = {'base_values', '_last_value', 'min_values'}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedGroupsConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor, with groups of equal settings merged.

    An optimizer updates the parameters of one group together, by few kernels
    (``foreach``, PyTorch's default on GPUs, and ``fused``). mmengine's groups of
    one parameter each leave it nothing to put together. Every parameter keeps its
    settings, so the update is the same. A training that began with mmengine's own
    constructor is taken up, see `merge_checkpoint`. Our choice, no part of the
    paper.

    Args:
        optim_wrapper_cfg (dict): As mmengine's.
        paramwise_cfg (dict, optional): As mmengine's, and ``layer_decay_rate``: the
            factor on the learning rate of each layer of the backbone to that of the
            layer behind it, for models of all three toolboxes whose backbone has
            ``get_layer_depth`` (LaViT, and some of mmpretrain's). Defaults to None.

    Raises:
        ValueError: When ``layer_decay_rate`` is not above 0 and at most 1, or the
            backbone has no ``get_layer_depth``; when modules share a parameter and
            ``bypass_duplicate`` is not set, for an optimizer would update it once for
            each of them.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """The optimizer's wrapper, whose ``merged_from`` has for each group the
        places of its parameters in mmengine's order."""
        self.merged_from = None  # without paramwise_cfg mmengine makes one group
        optim_wrapper = super().__call__(model)
        optim_wrapper.merged_from = self.merged_from
        # mmengine's ``compile`` would trace it too, which fails with foreach on CPUs.
        optim_wrapper.update_params = torch.compiler.disable(
            optim_wrapper.update_params)
        return optim_wrapper

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
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if rate is not None:
            self._decay_by_layer(params, module, rate)
        merged = {}
        for group in params:
            own = tuple(sorted(
                (key, repr(value)) for key, value in group.items() if key != 'params'))
            merged.setdefault(own, {**group, 'params': []})
            merged[own]['params'] += group['params']
        params[:] = merged.values()
        place = {each: i for i, each in enumerate(listed)}
        self.merged_from = [[place[id(parameter)] for parameter in group['params']]
                            for group in params]

    def _decay_by_layer(self, params: List[dict], model: nn.Module,
                        rate: float) -> None:
        """Lowers the learning rates, as mmpretrain's constructor does."""
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (
                0 < rate <= 1):
            raise ValueError(f'paramwise_cfg.layer_decay_rate={rate!r}: expected a '
                             'number above 0 and at most 1, such as 0.9')
        if self.base_lr is None:
            raise ValueError(f'optimizer.lr=None beside layer_decay_rate={rate}: expected '
                             'a number')
        prefix = 'backbone.' if hasattr(model, 'backbone') else ''
        backbone = model.backbone if prefix else model
        if not hasattr(backbone, 'get_layer_depth'):
            raise ValueError(
                f'paramwise_cfg.layer_decay_rate={rate}: {type(backbone).__name__} does '
                'not tell the depth of its layers: expected a backbone that has '
                'get_layer_depth, such as LaViT, or no layer_decay_rate')
        names = {id(x): name for name, x in model.named_parameters()}
        for group in params:
            depth, depths = backbone.get_layer_depth(
                names[id(group['params'][0])], prefix)
            group['lr'] = group.get('lr', self.base_lr) * rate**(depths - 1 - depth)


def merge_checkpoint(checkpoint: dict, optim_wrapper: OptimWrapper) -> None:
    """Merges the groups of a checkpoint as those of the optimizer are.

    For a training that began with mmengine's groups of one parameter each: the
    optimizer's state, and the schedules, which hold a value for each group.

    Args:
        checkpoint (dict): Of the training to resume; changed in place.
        optim_wrapper (OptimWrapper): The one that is to take up its state.

    Raises:
        ValueError: When the optimizer's groups do not fit those of the checkpoint,
            or parameters that now share a group had other settings there.
    """
    theirs = checkpoint['optimizer']['param_groups']
    ours = optim_wrapper.optimizer.param_groups
    merged_from = getattr(optim_wrapper, 'merged_from', None)
    sizes = [[len(group['params']) for group in groups] for groups in (theirs, ours)]
    if sizes[0] == sizes[1]:
        return
    if merged_from is None or sizes[0] != [1] * sum(sizes[1]):
        raise ValueError(
            f'its optimizer has {len(theirs)} groups of {sum(sizes[0])} parameters, '
            f'this one {len(ours)} of {sum(sizes[1])}: resume with the optim_wrapper '
            "it began with (its constructor, MergedGroupsConstructor or mmengine's "
            'own, and its paramwise_cfg)')

    def settings(i: int) -> dict:
        return {key: value for key, value in theirs[i].items() if key != 'params'}

    for places in merged_from:
        for i in places:
            if settings(i) != settings(places[0]):
                raise ValueError(
                    f'its optimizer updates parameter {places[0]} with '
                    f'{settings(places[0])}, but {i} with {settings(i)}, which now '
                    'share a group: resume with the optim_wrapper it began with')
    # Parameters keep their numbers there, by which the optimizer finds their state.
    checkpoint['optimizer']['param_groups'] = [
        dict(settings(places[0]), params=[theirs[i]['params'][0] for i in places])
        for places in merged_from]
    for schedule in checkpoint.get('param_schedulers', []):
        for key in OF_EACH_GROUP & schedule.keys():
            values = schedule[key]  # behind them mmengine's, of the base setting
            schedule[key] = [*(values[places[0]] for places in merged_from),
                             *values[len(theirs):]]
