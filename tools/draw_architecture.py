"""Draws the figure of the architecture from the plan that the backbone is built from.

    python tools/draw_architecture.py

Writes docs/img/architecture.png for light and architecture-dark.png for dark pages.
What was drawn stands in the pictures' metadata too; a test compares it with the plan,
so run this again whenever a preset or the rule of who inherits from whom changes.
"""
import argparse
import math
import sys
from pathlib import Path
from typing import Dict, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
PAPER = 'tiny', 'small', 'base'
INPUT = 224
WIDTH, HEIGHT = 100, 54  # of the drawing, in its own units
BAR, PITCH, TALL, FLOOR = 2.9, 3.4, 9, 31  # of the layers of the large figure


class Theme(NamedTuple):
    """Colours of a picture."""
    page: str
    card: str
    edge: str
    text: str
    quiet: str
    va: str
    la: str
    patch: str
    scores: str
    on_layer: str


THEMES = {
    'architecture.png': Theme(
        page='#ffffff', card='#f4f6f9', edge='#d0d7de', text='#1f2328',
        quiet='#59636e', va='#2f6fb5', la='#d9730d', patch='#9aa4af',
        scores='#c2500a', on_layer='#ffffff'),
    'architecture-dark.png': Theme(
        page='#0d1117', card='#161b22', edge='#3d444d', text='#f0f6fc',
        quiet='#9198a1', va='#4c8fd9', la='#f0883e', patch='#6e7681',
        scores='#ffa657', on_layer='#0d1117'),
}


def plan(name: str) -> list:
    """The stages of a preset, as `LaViT` plans them by default: `StageSpec`s."""
    # Here: it takes seconds, which --help need not wait for.
    from mmlavit.models.backbones.arch import plan_stages, resolve_arch
    sr_ratios = (8, 4, 2, 1)
    arch = resolve_arch(name, None, sr_ratios)
    return plan_stages(
        arch, range(len(arch['depths'])),
        dp_layers=[False] * sum(arch['depths']), in_channels=3,
        pretrain_img_size=INPUT, sr_ratios=sr_ratios, max_query_grid=14,
        max_key_grid=None, drop_path_rate=0.)


def describe(plans: Dict[str, list]) -> str:
    """What is drawn, as a text that changes whenever the picture should."""
    return '\n'.join(
        f'{name}, stride {spec.stride}, {spec.dims} channels: '
        + ' '.join(f'{layer.kind}<{layer.source}' for layer in spec.layers)
        for name, stages in plans.items() for spec in stages)


class Drawing:
    """Boxes, arrows and texts in one theme."""

    def __init__(self, ax: Axes, theme: Theme) -> None:
        self.ax, self.theme = ax, theme

    def box(self, x: float, y: float, width: float, height: float, color: str,
            label: str = '', edge: str = 'none', size: float = 11,
            label_color: str = '', z: float = 3) -> None:
        self.ax.add_patch(FancyBboxPatch(
            (x, y), width, height, boxstyle='round,pad=0,rounding_size=0.5',
            facecolor=color, edgecolor=edge, linewidth=1, zorder=z))
        self.text(x + width / 2, y + height / 2, label,
                  label_color or self.theme.on_layer, size, weight='bold')

    def text(self, x: float, y: float, label: str, color: str = '',
             size: float = 11, align: str = 'center',
             weight: str = 'normal') -> None:
        self.ax.text(x, y, label, color=color or self.theme.text, fontsize=size,
                     ha=align, va='center', weight=weight, zorder=6)

    def arrow(self, start: tuple, end: tuple, color: str, bend: float = 0,
              width: float = 1.6) -> None:
        self.ax.add_patch(FancyArrowPatch(
            start, end, connectionstyle=f'arc3,rad={bend}', color=color,
            arrowstyle='-|>,head_length=3.5,head_width=2', linewidth=width,
            shrinkA=0, shrinkB=0, zorder=5))


def draw_stages(d: Drawing, stages: list) -> None:
    """All layers of a preset from left to right, and the ways of the scores."""
    theme, top = d.theme, FLOOR + TALL
    pad, gap, image = 1.1, 4.1, 6.4
    x, stride, last = image + gap, 1, None
    d.box(0, FLOOR + 1.3, image, image, theme.card, 'image', theme.edge, 10.5,
          theme.text)
    d.text(image / 2 + 0.2, FLOOR - 1.5, f'{INPUT} × {INPUT}', theme.quiet, 10.5)
    middle = FLOOR + TALL / 2
    for i, spec in enumerate(stages):
        width = 2 * pad + PITCH * len(spec.layers) + 2.2
        stride *= spec.stride
        side = math.ceil(INPUT / stride)
        d.arrow((x - gap + 0.4, middle), (x - 0.3, middle), theme.quiet)
        d.box(x, FLOOR - 9.4, width, TALL + 14, theme.card, edge=theme.edge, z=1)
        centre = x + width / 2
        d.text(centre, FLOOR - 2.1, f'Stage {i + 1}', weight='bold', size=12)
        d.text(centre, FLOOR - 4.8, f'stride {stride}, {side} × {side}', theme.quiet, 10.5)
        d.text(centre, FLOOR - 7.3, f'{spec.dims} channels', theme.quiet, 10.5)
        d.box(x + pad, FLOOR, 1.7, TALL, theme.patch)
        bar = x + pad + 2.4
        for layer in spec.layers:
            here = bar + BAR / 2
            d.box(bar, FLOOR, BAR, TALL,
                  theme.va if layer.kind == 'VA' else theme.la, layer.kind)
            if layer.source == 'layer':
                d.arrow((last + 0.5, top + 0.3), (here - 0.5, top + 0.3),
                        theme.scores, -0.9)
            elif layer.source == 'stage':
                draw_inheritance(d, last, here, top, layer.kind)
            last, bar = here, bar + PITCH
        x += width + gap


def draw_legend(d: Drawing, y: float) -> None:
    """What the colours are."""
    theme = d.theme
    for x, color, label in ((17.5, theme.patch, 'patch embedding'),
                            (35, theme.va, 'layer that computes scores'),
                            (60, theme.la, 'layer that inherits them')):
        d.box(x, y - 0.9, 1.2, 1.8, color)
        d.text(x + 2, y, label, theme.quiet, 10.5, 'left')
    d.arrow((82.5, y), (85.5, y), theme.scores, width=2)
    d.text(86.3, y, 'attention scores', theme.quiet, 10.5, 'left')


def draw_inheritance(d: Drawing, start: float, end: float, top: float,
                     kind: str) -> None:
    """Scores that cross into a stage: added where it begins with VA."""
    d.arrow((start, top + 0.3), (end, top + 0.5), d.theme.scores, -0.42, 2)
    d.text((start + end) / 2, top + 6.3,
           'shrink, ' + ('add' if kind == 'VA' else 'inherit'), d.theme.scores, 11)


def draw_vanilla(d: Drawing, x: float, y: float) -> None:
    """Inside a VA layer: projections, scores, weighted values."""
    d.text(x, y + 15.6, 'VA: vanilla attention', d.theme.va, 12.5, 'left', 'bold')
    draw_projections(d, x, y, ('Q', 'K', 'V'), d.theme.va)
    d.arrow((x + 10.2, y + 9), (x + 11.7, y + 9), d.theme.quiet)
    draw_weighting(d, x, y, r'$S_l = QK^T$', 19.4)


def draw_less(d: Drawing, x: float, y: float) -> None:
    """Inside an LA layer: inherited scores mixed over tokens, values of its own."""
    d.text(x, y + 15.6, 'LA: less attention', d.theme.la, 12.5, 'left', 'bold')
    d.text(x + 6.9, y + 9, r'$S_{l-1}$', d.theme.scores, 13)
    d.arrow((x + 9.3, y + 9), (x + 11.6, y + 9), d.theme.scores, width=2)
    draw_projections(d, x, y, ('V', ), d.theme.la)
    draw_weighting(d, x, y, r'$S_l = \Psi(\Theta(S_{l-1})^T)^T$', 27.2)


def draw_projections(d: Drawing, x: float, y: float, names: tuple,
                     color: str) -> None:
    """Tokens and the boxes of their linear projections; V lies lowest."""
    d.text(x, y + 2, 'tokens', d.theme.quiet, 10.5, 'left')
    for i, name in enumerate(reversed(names)):
        low = y + 0.4 + (0, 4.9, 8.5)[i]
        d.box(x + 6.8, low, 3, 3, color, name, size=11.5)
        d.arrow((x + 4.9, y + 2), (x + 6.6, low + 1.5), d.theme.quiet)


def draw_weighting(d: Drawing, x: float, y: float, scores: str,
                   end: float) -> None:
    """The scores, which go on to the next layer, and softmax(S) V below them."""
    left = x + 12.2
    d.text(left, y + 9, scores, size=13, align='left')
    d.arrow((x + end, y + 9), (x + end + 2.2, y + 9), d.theme.scores, width=2)
    d.text(x + end + 2.9, y + 9, r'$S_l$', d.theme.scores, 13, 'left')
    d.arrow((left + 3, y + 7.3), (left + 3, y + 3.7), d.theme.quiet)
    d.arrow((x + 10.2, y + 1.9), (x + 11.7, y + 1.9), d.theme.quiet)
    d.text(left, y + 1.9, r'$\mathrm{softmax}(S_l)\,V$', size=13, align='left')


def draw_presets(d: Drawing, x: float, y: float, plans: Dict[str, list]) -> None:
    """A row of small squares, one a layer, for each preset."""
    theme = d.theme
    d.text(x, y + 15.6, 'The three presets', size=12.5, align='left', weight='bold')
    for row, (name, stages) in enumerate(plans.items()):
        low, left = y + 9.4 - 4.2 * row, x + 7.2
        d.text(x, low + 0.7, f'LaViT-{name[0].upper()}', theme.quiet, 10.5, 'left')
        for spec in stages:
            for layer in spec.layers:
                d.ax.add_patch(plt.Rectangle(
                    (left, low), 0.5, 1.6, linewidth=0,
                    color=theme.va if layer.kind == 'VA' else theme.la))
                left += 0.66
            left += 0.8


def draw(path: Path, theme: Theme, plans: Dict[str, list]) -> None:
    figure = plt.figure(figsize=(11, 11 * HEIGHT / WIDTH), facecolor=theme.page)
    ax = figure.add_axes([0.012, 0.012, 0.976, 0.976])
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect='equal')
    ax.axis('off')
    d = Drawing(ax, theme)
    draw_stages(d, plans['small'])
    d.text(0, HEIGHT - 1.2, 'LaViT-S', size=14, align='left', weight='bold')
    draw_legend(d, HEIGHT - 1.2)
    draw_vanilla(d, 0, 0.6)
    draw_less(d, 31, 0.6)
    draw_presets(d, 70.5, 0.6, plans)
    figure.savefig(path, dpi=170, metadata={'Description': describe(plans)})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--out', type=Path, default=ROOT / 'docs/img', metavar='DIR',
        help='folder that is written to; default: docs/img; e.g. --out pictures')
    parser.add_argument(
        '--check', action='store_true',
        help="draw nothing; exit 1 if a picture is of another plan than today's; "
        'default: draw; e.g. --check')
    args = parser.parse_args()
    plans = {name: plan(name) for name in PAPER}
    if args.check:
        stale = [name for name in THEMES if Image.open(
            args.out / name).text['Description'] != describe(plans)]
        sys.exit(f'stale: {", ".join(stale)}; run python '
                 'tools/draw_architecture.py' if stale else 0)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, theme in THEMES.items():
        draw(args.out / name, theme, plans)
        print(args.out / name)


if __name__ == '__main__':
    main()
