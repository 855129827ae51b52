"""Less attention put into a model of a stock class, and taken out again."""
from contextlib import ExitStack
from typing import Dict, Hashable, List, NamedTuple, Optional, Sequence, Set

from mmengine.logging import MMLogger
from torch import nn

from ..models.layers.mixing import DEFAULT_RANK, MIXINGS
from ..models.losses.dp_loss import build_dp_loss, select_layers
from ..utils.checks import (require, require_bool, require_choice, require_int,
                            require_ints)
from .families import Family, Spot, require_stock
from .handover import Exchange, Handover
from .layer import Role

# Our choice, as `LaViT`'s max_query_grid: Theta and Psi of larger inputs are learned
# on this grid.
MAX_BASE_GRID = 14


class ConvertedLayer(NamedTuple):
    """A layer that was given less attention."""
    index: int  # from 0 through all stages
    name: str  # its module's in the model
    similarity: Optional[float] = None  # of its map to its source's, if measured


class LessAttentionPlan:
    """What was changed in a model, and the way back.

    Attributes:
        model (nn.Module): The model that was changed.
        layers (list[ConvertedLayer]): Those that have less attention now.
        dp_loss (nn.Module, optional): The DP loss; ``dp_loss.take()`` is to be added
            to a training loss of one's own.
        report (str): What was chosen and what it saves, of ``layers='auto'``.
    """

    def __init__(self, model: nn.Module, layers: List[ConvertedLayer],
                 dp_loss: Optional[nn.Module], undo: ExitStack) -> None:
        self.model = model
        self.layers = layers
        self.dp_loss = dp_loss
        self.report = ''
        self._undo = undo

    def remove(self) -> nn.Module:
        """Gives the model its own attention back: the very modules that it had.

        What V, Theta and Psi have learned is lost, and what was loaded into them: these
        projections have the weights of before the conversion. All other weights stay as
        they are.
        """
        self._undo.close()
        return self.model

    def __repr__(self) -> str:
        names = ', '.join(layer.name for layer in self.layers) or 'no layer'
        return f'LessAttentionPlan({type(self.model).__name__}: {names})'


def convert(model: nn.Module, family: Family, layers: Sequence[int], *,
            residual_layers: Sequence[int] = (), mixing: str = 'full',
            mixing_rank: int = DEFAULT_RANK, max_base_grid: int = MAX_BASE_GRID,
            dp_loss: Optional[dict] = None, with_cp: bool = False,
            layers_name: str = 'layers',
            root: Optional[nn.Module] = None) -> LessAttentionPlan:
    """Gives layers of a model less attention, in place.

    Args:
        model (nn.Module): Of the family's stock class.
        family (Family): What is to be known of that class.
        layers (Sequence[int]): Indices of layers, from 0 through all stages. None: the
            model computes what it did, and can be observed.
        residual_layers (Sequence[int]): Layers that add the scores of the stage before
            to their own, where they have vanilla attention.
        mixing, mixing_rank, max_base_grid, dp_loss, with_cp: As for
            `add_less_attention`.
        layers_name (str): What ``layers`` is called where the user gives it, for
            messages.
        root (nn.Module, optional): The model that has this one inside, for names and
            the plan. Defaults to None: this one.

    Raises:
        TypeError, ValueError: For layers that cannot inherit, and arguments that
            cannot work. The model is as it was.
    """
    root = model if root is None else root
    spots = family.spots(model)
    names = {id(module): name for name, module in root.named_modules()}
    for spot in spots:
        require_stock(getattr(spot.holder, spot.projection), family.projection_class,
                      f'{names[id(spot.holder)]}.{spot.projection}')
    layers = sorted(set(require_ints(layers_name, layers, 0, len(spots) - 1)))
    residual_layers = [i for i in residual_layers if i not in layers]
    sources = find_sources(family, spots, layers, residual_layers,
                           [names[id(spot.layer)] for spot in spots], layers_name)
    options = dict(
        mixing=require_choice('mixing', mixing, MIXINGS),
        mixing_rank=require_int('mixing_rank', mixing_rank, 1))
    max_base_grid = require_int('max_base_grid', max_base_grid, 1)
    with_cp = require_bool('with_cp', with_cp)
    loss = build_dp_loss(dp_loss)
    dp_layers = select_layers(loss, [i in layers for i in range(len(spots))])

    with ExitStack() as undo:
        handover = make_handover(undo, model, family, loss)
        givers, replaced = find_givers(spots, sources), []
        for i, spot in enumerate(spots):
            role = Role(
                name=names[id(spot.layer)],
                stage=spot.stage,
                lane=spot.lane,
                kind='LA' if i in layers else 'VA',
                source=sources[i],
                gives=i in givers,
                index=i,
                last=i == len(spots) - 1,
                recomputes=with_cp or getattr(spot.layer, 'with_cp', False),
                dp_loss=dp_layers[i],
                scale=spot.scale,
                extra=spot.extra,
                handover=handover,
                exchange=Exchange())
            before = spots[i - 1] if sources[i] not in (None, spot.lane) else None
            replaced.append(convert_layer(undo, family, spot, role, before,
                                          max_base_grid, options))
        if layers:
            weights = StockWeights(type(model).__name__, {
                name: module for name, module in model.named_modules()
                if any(module is x for x in replaced)})
            undo.callback(model._register_load_state_dict_pre_hook(weights.fit).remove)
        chosen = [ConvertedLayer(i, names[id(spots[i].layer)]) for i in layers]
        return LessAttentionPlan(root, chosen, loss, undo.pop_all())


def make_handover(undo: ExitStack, model: nn.Module, family: Family,
                  loss: Optional[nn.Module]) -> Handover:
    """What the layers of a forward pass hand on, attached to the model."""
    handover = Handover(type(family).find_grid)
    handover.dp_loss = loss
    if loss is not None:
        model.dp_loss = loss
        undo.callback(delattr, model, 'dp_loss')
    if handover.find_grid is not None:
        undo.callback(
            model.patch_embed.register_forward_hook(handover.keep_grid).remove)
    return handover


def convert_layer(undo: ExitStack, family: Family, spot: Spot, role: Role,
                  before: Optional[Spot], max_base_grid: int,
                  options: dict) -> Optional[nn.Module]:
    """Gives a layer its role; returns what took the place of its Q, K and V, if any."""
    module = None
    if role.kind == 'LA':
        module = family.less_attention(
            spot, role.exchange, before,
            q_base_grid=family.base_grid(spot.q_grid, max_base_grid),
            k_base_grid=family.base_grid(spot.k_grid, max_base_grid), **options)
        replace(undo, spot, module)
    else:
        family.keep_scores(undo, spot, role.exchange, before)
    family.keep_maps(undo, spot, role.exchange)
    become(undo, spot.layer, family.layer_class, role)
    return module


def find_sources(family: Family, spots: Sequence[Spot], layers: Sequence[int],
                 residual_layers: Sequence[int], names: Sequence[str],
                 layers_name: str) -> List[Optional[Hashable]]:
    """Of each layer the lane that it takes scores from, or None.

    A layer with less attention takes those of the nearest earlier layer of its lane;
    the first of a stage those of the stage before, where the family can.

    Raises:
        ValueError: If a layer that takes scores has no source.
    """
    sources, can, seen, takers = [], [], set(), {*layers, *residual_layers}
    for i, spot in enumerate(spots):
        source = spot.lane if spot.lane in seen else family.source_across(spots, i)
        seen.add(spot.lane)
        if source is not None:
            can.append(i)
        sources.append(source if i in takers else None)
    for argument, value, chosen in ((layers_name, layers, layers),
                                    ('attn_residual', True, residual_layers)):
        wrong = [i for i in sorted(chosen) if i not in can]
        require(
            not wrong, argument, value,
            f'layers that can inherit scores, which are {can}: ' + '; '.join(
                f'{names[i]} ({i}) is {family.why_none(spots, i)}' for i in wrong))
    return sources


def find_givers(spots: Sequence[Spot], sources: Sequence[Optional[Hashable]]) -> Set[int]:
    """The layers whose scores others take."""
    latest, givers = {}, set()
    for i, (spot, source) in enumerate(zip(spots, sources)):
        if source is not None:
            givers.add(latest[source])
        latest[spot.lane] = i
    return givers


def replace(undo: ExitStack, spot: Spot, module: nn.Module) -> None:
    """Puts a module in the projection's place."""
    stock = getattr(spot.holder, spot.projection)

    def put_back() -> None:
        # The model may have been moved or frozen meanwhile.
        weight = module.v.weight
        stock.to(weight).train(module.training)
        setattr(spot.holder, spot.projection, stock.requires_grad_(weight.requires_grad))

    setattr(spot.holder, spot.projection, module.train(stock.training))
    undo.callback(put_back)


def become(undo: ExitStack, layer: nn.Module, layer_class: type, role: Role) -> None:
    """Makes a stock layer one that takes and gives scores."""
    stock = type(layer)
    undo.callback(setattr, layer, '__class__', stock)
    undo.callback(delattr, layer, 'role')
    layer.__class__, layer.role = layer_class, role
    if getattr(layer, 'with_cp', False):
        # The stock's would lose the gradients of scores.
        undo.callback(setattr, layer, 'with_cp', True)
        layer.with_cp = False


class StockWeights:
    """Fits checkpoints of the stock class to a converted model while they load.

    Args:
        model (str): The class of the model, for messages.
        replaced (dict[str, LessProjection]): What took a projection's place, by name.
    """

    def __init__(self, model: str, replaced: Dict[str, nn.Module]) -> None:
        self.model = model
        self.replaced = replaced

    def fit(self, state_dict: dict, prefix: str, *args) -> None:
        """Hook before ``load_state_dict``; changes ``state_dict``, says what it drops."""
        dropped = []
        for name, module in self.replaced.items():
            start = f'{prefix}{name}.'
            given = {key[len(start):]: key for key in state_dict
                     if key.startswith(start)}
            if not module.stock_names.keys() & given.keys():
                continue
            weights = module.from_stock(
                {key: state_dict.pop(whole) for key, whole in given.items()})
            state_dict.update({f'{start}{key}': x for key, x in weights.items()})
            dropped.append(name)
        if dropped:
            MMLogger.get_current_instance().info(
                f'{self.model}: weights of the stock class. Less attention has no Q '
                f'and K: those of {", ".join(dropped)} are dropped, and Theta and Psi '
                'begin at the identity.')
