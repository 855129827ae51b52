"""Blocks and stages: patches in, then layers that hand their scores on."""
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import repeat
from typing import Iterator, NamedTuple, Optional, Sequence, Tuple

import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import LessAttention, VanillaAttention
from .grid import Grid, Grids, to_map, to_tokens
from .norms import build_activation, build_norm, normalise
from .scores import AttentionDownsample, LayerScores, Scores
from .step import Layer, Observable
from .tracing import is_compiling, is_exporting


class ConvFFN(nn.Module):
    """Feed-forward network with a depth-wise 3x3 convolution, as in PVTv2.

    Args:
        dims (int): Number of channels.
        hidden_dims (int): Channels of the hidden layer.
        act_cfg (dict): Config of the activation.
        drop_rate (float): Dropout rate.
    """

    def __init__(self, *, dims: int, hidden_dims: int, act_cfg: dict,
                 drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims, hidden_dims)
        self.dwconv = nn.Conv2d(
            hidden_dims, hidden_dims, 3, padding=1, groups=hidden_dims)
        self.act = build_activation(act_cfg, hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if self._fuses_convolutions(x):
            return self._as_convolutions(x, grid)
        x = self.fc1(x)
        x = to_tokens(self.dwconv(to_map(x, grid)))
        return self.drop(self.fc2(self.drop(self.act(x))))

    def _fuses_convolutions(self, x: Tensor) -> bool:
        """Whether what runs this is faster with convolutions than with linear layers.

        Runtimes are. torch.compile is in inference on a CPU (1.02 to 1.12 times as fast);
        a GPU was not measured.
        """
        return is_exporting() or (
            is_compiling() and not self.training and x.device.type == 'cpu')

    def _as_convolutions(self, x: Tensor, grid: Grid) -> Tensor:
        """The same in inference, all on maps.

        Runtimes copy between tokens and maps: once each way then, of the narrow map.
        """
        fc1, fc2 = (partial(F.conv2d, weight=fc.weight[..., None, None], bias=fc.bias)
                    for fc in (self.fc1, self.fc2))
        return to_tokens(fc2(self.act(self.dwconv(fc1(to_map(x, grid))))))


@contextmanager
def keep_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms inside count no batch: a recomputed one was counted before."""
    norms = [(x, x.momentum, x.num_batches_tracked) for x in module.modules()
             if isinstance(x, _BatchNorm)]
    for norm, _, count in norms:
        # SyncBN asks for a counter: this one counts a copy.
        norm.momentum = 0.
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count


class Block(Observable, nn.Module):
    """Pre-norm attention and FFN, with the scores passing through beside.

    Args:
        attn (VanillaAttention | LessAttention): The attention.
        dims (int): Number of channels.
        mlp_ratio (float): Width of the FFN's hidden layer over ``dims``.
        norm_cfg (dict): Config of the norms.
        act_cfg (dict): Config of the activation.
        drop_rate (float): Dropout rate of the FFN.
        drop_path_rate (float): Rate of stochastic depth.
        with_cp (bool): Whether to recompute activations in the backward pass.
        stage (int): The stage it is in.
    """

    def __init__(self, *, attn: nn.Module, dims: int, mlp_ratio: float,
                 norm_cfg: dict, act_cfg: dict, drop_rate: float,
                 drop_path_rate: float, with_cp: bool, stage: int) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.stage = stage
        self.norm1 = build_norm(norm_cfg, dims)
        self.attn = attn
        self.norm2 = build_norm(norm_cfg, dims)
        self.ffn = ConvFFN(
            dims=dims,
            hidden_dims=int(dims * mlp_ratio),
            act_cfg=act_cfg,
            drop_rate=drop_rate)
        self.drop_path = (
            DropPath(drop_path_rate) if drop_path_rate else nn.Identity())

    def forward(self, x: Tensor, grids: Grids, inherited: LayerScores,
                dp_loss: Optional[nn.Module] = None
                ) -> Tuple[Tensor, LayerScores, Optional[Tensor]]:
        """x (B, N, C) and the scores of the layer before.

        The value of ``dp_loss`` comes from here too: FSDP has a layer's weights whole in
        its forward alone.
        """
        if self.with_cp and x.requires_grad:
            again = {}
            # A compiler recomputes without running the batch norms again.
            if not is_compiling() and any(
                    isinstance(module, _BatchNorm) for module in self.modules()):
                again['context_fn'] = lambda: (nullcontext(),
                                               keep_statistics(self))
            x, scores = checkpoint(
                self._forward, x, grids, inherited, use_reentrant=False, **again)
        else:
            x, scores = self._forward(x, grids, inherited)
        if self.observers:
            self.hand_out(Layer(
                self.attn.kind, self.stage, 0, grids, x, scores,
                lambda start, stop: self.attn.probabilities(
                    scores.rows(start, stop))))
        if dp_loss is None:
            return x, scores, None
        args = scores, grids, inherited, self.attn
        return x, scores, (checkpoint(dp_loss, *args, use_reentrant=False)
                           if self.with_cp else dp_loss(*args))

    def _forward(self, x, grids, scores):
        grid = grids.queries
        z, scores = self.attn(normalise(self.norm1, x, grid), grids, scores)
        x = x + self.drop_path(z)
        z = self.ffn(normalise(self.norm2, x, grid), grid)
        return x + self.drop_path(z), scores


def require_gradients(kind: str, x: Tensor, inherited: LayerScores,
                      scores: LayerScores, stage: int) -> None:
    """Refuses scores that somebody else's recomputation has cut off.

    PyTorch's reentrant checkpoint does not see tensors within tuples: gradients that
    pass through the scores would be missing without a word.

    Raises:
        RuntimeError: If they lack the gradients of what they are made of: in 'LA' the
            inherited scores, in 'VA' the tokens ``x``.
    """
    if kind == 'LA':
        pairs = zip(inherited.tensors(), scores.tensors())
    else:
        pairs = zip(repeat(x), LayerScores(scores.own).tensors())
    if any(source.requires_grad and not made.requires_grad for source, made in pairs):
        raise RuntimeError(
            f'LaViT: the scores of a layer of stage {stage} have lost their gradients: '
            'something recomputes activations around single layers '
            '(activation_checkpointing): use with_cp=True of the backbone instead')


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution and a norm, as in PVTv2.

    Args:
        in_channels (int): Channels of the map that comes in.
        dims (int): Channels of the tokens.
        patch_size (int): Kernel size, odd, so that an input of ``n`` rows
            gives ``ceil(n / stride)``.
        stride (int): Stride.
        norm_cfg (dict): Config of the norm.
    """

    def __init__(self, *, in_channels: int, dims: int, patch_size: int,
                 stride: int, norm_cfg: dict) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, dims, patch_size, stride, padding=patch_size // 2)
        self.norm = build_norm(norm_cfg, dims)

    def forward(self, x: Tensor) -> Tuple[Tensor, Grid]:
        """(B, C_in, H, W) -> (B, h * w, C), (h, w)."""
        x = self.conv(x)
        grid = tuple(x.shape[2:])
        return normalise(self.norm, to_tokens(x), grid), grid


class LayerSpec(NamedTuple):
    """One layer: what it is, whose scores it has, what is its own."""
    kind: str  # 'VA' or 'LA'
    # Whose scores come in: 'stage', the stage before's, downsampled; 'layer', the
    # layer before's; None, nobody's.
    source: Optional[str]
    drop_path_rate: float
    dp_loss: bool  # whether the DP loss is on it


class StageOutput(NamedTuple):
    """What a stage hands on."""
    tokens: Tensor  # (B, N, C), for the next stage
    output: Tensor  # (B, N, C), normalised, where the stage has a norm
    scores: Scores  # for the next stage
    grid: Grid  # of tokens and scores
    dp_losses: Sequence[Tensor]  # of the layers that the DP loss is on


class Stage(nn.Module):
    """Patch embedding, then the layers, then a norm.

    Args:
        layers (Sequence[LayerSpec]): The layers.
        in_channels (int): Channels of the map that comes in.
        dims (int): Number of channels.
        num_heads (int): Number of heads.
        source_heads (int): Heads of the stage before, if scores come from it.
        patch_size (int): Kernel size of the patch embedding.
        stride (int): Stride of the patch embedding.
        mlp_ratio (float): Width of the FFNs' hidden layer over ``dims``.
        sr_ratio (int): Spatial reduction of keys and values.
        max_key_grid (int, optional): Largest side of the key grid.
        q_base_grid (tuple[int, int]): Base grid of Psi.
        k_base_grid (tuple[int, int]): Base grid of Theta.
        norm (str, optional): 'trunk': a norm, whose result the next stage and the
            output both see; 'output': the output alone; None: no norm.
        number (int): Which stage it is, from 0.
        qkv_bias, value_reduction, transform, mixing, mixing_rank, score_path,
            drop_rate, attn_drop_rate, norm_cfg, act_cfg, with_cp: As for `LaViT`.
    """

    def __init__(self, *, layers: Sequence[LayerSpec], in_channels: int,
                 dims: int, num_heads: int, source_heads: int, patch_size: int,
                 stride: int, mlp_ratio: float, sr_ratio: int,
                 max_key_grid: Optional[int], q_base_grid: Grid,
                 k_base_grid: Grid, norm: Optional[str], number: int, qkv_bias: bool,
                 value_reduction: str, transform: str, mixing: str,
                 mixing_rank: int, score_path: str, drop_rate: float,
                 attn_drop_rate: float, norm_cfg: dict, act_cfg: dict,
                 with_cp: bool) -> None:
        super().__init__()
        self.number = number
        self.layers = layers
        self.sr_ratio = sr_ratio
        self.max_key_grid = max_key_grid
        self.patch_embed = PatchEmbed(
            in_channels=in_channels,
            dims=dims,
            patch_size=patch_size,
            stride=stride,
            norm_cfg=norm_cfg)
        self.downsample = None
        if any(layer.source == 'stage' for layer in layers):
            self.downsample = AttentionDownsample(source_heads, num_heads,
                                                  stride)
        attention = dict(
            dims=dims,
            num_heads=num_heads,
            sr_ratio=sr_ratio,
            qkv_bias=qkv_bias,
            attn_drop_rate=attn_drop_rate,
            drop_rate=drop_rate,
            norm_cfg=norm_cfg)
        inheritance = dict(
            value_reduction=value_reduction,
            q_base_grid=q_base_grid,
            k_base_grid=k_base_grid,
            transform=transform,
            mixing=mixing,
            mixing_rank=mixing_rank)
        self.blocks = nn.ModuleList(
            Block(
                attn=(VanillaAttention(**attention, score_path=score_path)
                      if layer.kind == 'VA' else
                      LessAttention(**attention, **inheritance)),
                dims=dims,
                mlp_ratio=mlp_ratio,
                norm_cfg=norm_cfg,
                act_cfg=act_cfg,
                drop_rate=drop_rate,
                drop_path_rate=layer.drop_path_rate,
                with_cp=with_cp,
                stage=number) for layer in layers)
        self.norm = None if norm is None else build_norm(norm_cfg, dims)
        self.norm_in_trunk = norm == 'trunk'

    def forward(self,
                x: Tensor,
                last: Optional[StageOutput],
                dp_loss: Optional[nn.Module] = None) -> StageOutput:
        """A map (B, C_in, H, W) and what the stage before handed on.

        With ``dp_loss`` its values for the layers it is on are handed on too.
        """
        x, grid = self.patch_embed(x)
        grids = Grids.of(grid, self.sr_ratio, self.max_key_grid)
        sources = {None: LayerScores()}
        if self.downsample is not None:
            sources['stage'] = LayerScores(
                inherited=self.downsample(last.scores, last.grid))
        dp_losses = []
        for layer, block in zip(self.layers, self.blocks):
            inherited = sources[layer.source]
            before = x, inherited
            x, scores, value = block(
                x, grids, inherited, dp_loss if layer.dp_loss else None)
            require_gradients(layer.kind, *before, scores, self.number)
            sources['layer'] = scores
            if value is not None:
                dp_losses.append(value)
        output = x if self.norm is None else normalise(self.norm, x, grid)
        return StageOutput(output if self.norm_in_trunk else x, output,
                           scores.to_next_stage(), grid, dp_losses)
