"""How alike a model's attention maps and tokens are, by depth, and pictures of them.

    python tools/analyze_attention.py CONFIG CHECKPOINT IMAGES --out DIR
    python tools/analyze_attention.py CONFIG CHECKPOINT IMAGES --compare CONFIG CHECKPOINT

For classifiers, detectors and segmentors with LaViT, or with a ViT, DeiT, PVT or Swin
of the toolboxes, with and without less attention.
IMAGES is a folder (searched through) or a file. CHECKPOINT may be ``none``: initial
weights. Writes to DIR:

    similarity.json, .csv   every measure of every layer; maps, each layer to each
    similarity.png          the same as curves and matrices
    attention.png           where chosen points of the first image look, by layer; not of
                            Swin, whose layers attend within windows
    features.png            the stages' feature maps
    (.png with both models where --compare is given)
"""
import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List

if TYPE_CHECKING:
    import numpy as np

    from mmlavit.analysis.images import ImageMaps

UNBOUNDED = 'asymmetry', 'score_deviation'
TITLES = dict(
    map_similarity_to_previous="maps: cosine to the layer before",
    head_similarity='maps: cosine between heads',
    token_similarity='tokens: mean pairwise cosine',
    asymmetry='asymmetry of the map (DP condition 1)',
    diagonal_largest='rows with the largest diagonal (DP condition 2)',
    entropy='entropy of the map (1: uniform, 0: one key)',
    score_deviation='standard deviation of scores over keys')


def plot_similarity(results: Dict[str, dict], out: Path) -> None:
    """Curves of the measures by depth; a matrix of the maps for each model."""
    import numpy as np
    from matplotlib.figure import Figure
    fig = Figure(figsize=(16, 12.5))
    axes = fig.subplots(3, 3).ravel()
    for ax, measure_name in zip(axes, TITLES):
        for label, result in results.items():
            values = [layer[measure_name] for layer in result['layers']]
            x = [i for i, v in enumerate(values) if v is not None]
            line, = ax.plot(x, [values[i] for i in x], '-', label=label)
            for kind, marker in (('VA', 'o'), ('LA', '^')):
                at = [i for i in x if result['layers'][i]['kind'] == kind]
                ax.plot(at, [values[i] for i in at], marker,
                        color=line.get_color(), ms=5)
            if measure_name == 'token_similarity':
                stages = [layer['stage'] for layer in result['layers']]
                for i in range(1, len(stages)):
                    if stages[i] != stages[i - 1]:
                        ax.axvline(i - .5, color='0.8', lw=1, zorder=0)
        ax.set_title(TITLES[measure_name], fontsize=11)
        ax.set_xlabel('layer (o VA, ^ LA)', fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(*((None, None) if measure_name in UNBOUNDED else
                      (min(0, ax.get_ylim()[0]), 1.03)))
        ax.grid(alpha=.3)
    axes[0].legend(fontsize=10)
    for ax, (label, result) in zip(axes[len(TITLES):], results.items()):
        matrix = np.array(result['map_similarity'], dtype=float)
        image = ax.imshow(matrix, vmin=0, vmax=1, cmap='viridis')
        ax.set_title(f'maps, each layer to each: {label}', fontsize=11)
        fig.colorbar(image, ax=ax, fraction=.046)
    for ax in axes[len(TITLES) + len(results):]:
        ax.axis('off')
    fig.tight_layout()
    fig.savefig(out, dpi=80)


def plot_attention(models: Dict[str, 'ImageMaps'], image: 'np.ndarray',
                   points: List[tuple], heads: bool, out: Path) -> None:
    """A row for every point (and head), a column for every layer.

    Args:
        models: What each model makes of the image.
        image: In RGB.
        points: (x, y) as shares of width and height.
        heads: Whether each head has a row, instead of their mean.
        out: The file.
    """
    from matplotlib.figure import Figure
    height, width = image.shape[:2]
    rows = []  # (title, point, layers, what is shown of each)
    for label, (layers, _) in models.items():
        for p, point in enumerate(points):
            if not heads:
                rows.append((label, point, layers,
                             [layer.maps[p].mean(0) for layer in layers]))
                continue
            for h in range(max(layer.maps.shape[1] for layer in layers)):
                rows.append((f'{label}\nhead {h}', point, layers,
                             [layer.maps[p, h] if h < layer.maps.shape[1] else None
                              for layer in layers]))
    columns = max(len(layers) for _, _, layers, _ in rows)
    fig = Figure(figsize=(1.5 * columns + 1.5, 1.65 * len(rows)))
    axes = fig.subplots(len(rows), columns + 1, squeeze=False)
    for ax in axes.ravel():
        ax.axis('off')
    for (title, (x, y), layers, shown), (first, *others) in zip(rows, axes):
        first.imshow(image)
        first.set_title(title, fontsize=8)
        used = [first]
        for i, (ax, layer, attention) in enumerate(zip(others, layers, shown)):
            if attention is None:  # fewer heads
                continue
            ax.imshow(image)
            ax.imshow(attention, cmap='inferno', alpha=.65,
                      interpolation='bilinear',
                      extent=(-.5, width - .5, height - .5, -.5))
            ax.set_title(f'layer {i} {layer.kind}', fontsize=8)
            used.append(ax)
        for ax in used:
            ax.plot(x * width, y * height, '+', color='cyan', ms=8, mew=1.5)
    fig.tight_layout(pad=.3)
    fig.savefig(out, dpi=75, bbox_inches='tight')


def plot_features(models: Dict[str, 'ImageMaps'], image: 'np.ndarray',
                  out: Path) -> None:
    """The magnitude of the tokens at the end of each stage."""
    from matplotlib.figure import Figure
    columns = max(len(features) for _, features in models.values())
    fig = Figure(figsize=(2.2 * columns + 2.2, 2.4 * len(models)))
    axes = fig.subplots(len(models), columns + 1, squeeze=False)
    for ax in axes.ravel():
        ax.axis('off')
    for (label, (_, features)), (first, *others) in zip(models.items(), axes):
        first.imshow(image)
        first.set_title(label, fontsize=9)
        for i, (ax, feature) in enumerate(zip(others, features)):
            ax.imshow(feature, cmap='viridis')
            ax.set_title(f'stage {i}', fontsize=9)
    fig.tight_layout(pad=.3)
    fig.savefig(out, dpi=75)


def point(text: str) -> tuple:
    """X,Y as shares of width and height."""
    x, y = (float(value) for value in text.split(','))
    if not (0 <= x < 1 and 0 <= y < 1):
        raise argparse.ArgumentTypeError(
            f'{text}: expected X,Y as shares of width and height, below 1')
    return x, y


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='e.g. configs/lavit_t_in1k.py')
    parser.add_argument(
        'checkpoint', help="a file, or 'none' for initial weights; e.g. "
        'work_dirs/lavit_t_in1k/epoch_300.pth')
    parser.add_argument(
        'images', type=Path, help='folder or file; e.g. data/imagenet/val')
    parser.add_argument(
        '--compare', nargs=2, metavar=('CONFIG', 'CHECKPOINT'),
        help='a second model; default: none; e.g. --compare '
        'configs/baselines/deit-s_in1k.py none')
    parser.add_argument(
        '--labels', nargs='+', metavar='NAME',
        help="the models' names in plots; default: the configs'; e.g. --labels "
        'LaViT twin')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/analysis'), metavar='DIR',
        help='folder that is written to; default: %(default)s; e.g. --out '
        'work_dirs/maps')
    parser.add_argument(
        '--size', type=int, nargs=2, default=(224, 224), metavar=('H', 'W'),
        help='height and width in pixels to which images are resized, rounded up '
        'to 32; default: 224 224; e.g. --size 448 672')
    parser.add_argument(
        '--max-images', type=int, default=64, metavar='N',
        help='of more, so many are spread over the folder; default: %(default)s; '
        'e.g. --max-images 500')
    parser.add_argument(
        '--batch-size', type=int, default=8, metavar='N',
        help='images at a time; default: %(default)s; e.g. --batch-size 1')
    parser.add_argument(
        '--points', type=point, nargs='+', metavar='X,Y',
        default=[(.5, .5), (.2, .2)],
        help='query points, shares of width and height; default: 0.5,0.5 0.2,0.2; '
        'e.g. --points 0.3,0.7')
    parser.add_argument(
        '--heads', action='store_true',
        help='attention of each head; default: their mean; e.g. --heads')
    parser.add_argument(
        '--device', metavar='NAME',
        help='default: cuda where there is a GPU, else cpu; e.g. --device cpu')
    args = parser.parse_args()
    for name in ('max_images', 'batch_size'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} {getattr(args, name)}: expected '
                         'at least 1')
    if args.labels and len(args.labels) != 1 + bool(args.compare):
        parser.error(f'--labels {" ".join(args.labels)}: expected one for each of '
                     f'the {1 + bool(args.compare)} models')
    return args


def mean_rows(results: Dict[str, dict], title: str) -> List[dict]:
    """A row for each measure, a column for each model."""
    from mmlavit.analysis.report import number
    rows = []
    for name, measure in TITLES.items():
        rows.append({title: measure})
        for label, result in results.items():
            values = [layer[name] for layer in result['layers']
                      if layer[name] is not None]
            rows[-1][label] = number(sum(values) / len(values) if values else None, 3)
    return rows


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    import torch

    from mmlavit.analysis.building import load_model
    from mmlavit.analysis.images import (find_images, measure_similarity,
                                         observe_image, read_image)
    from mmlavit.analysis.measures import similarity_rows
    from mmlavit.analysis.report import markdown_table, write_csv
    logging.disable(logging.INFO)
    # Detectors pad to that; so that pictures and maps are of the same area.
    size = tuple(-(-side // 32) * 32 for side in args.size)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    models = [(args.config, args.checkpoint)]
    if args.compare:
        models.append(tuple(args.compare))
    labels = args.labels or [Path(config).stem for config, _ in models]
    if len(set(labels)) < len(models):
        labels = [f'{label} ({i})' for i, label in enumerate(labels, 1)]
    results, maps = {}, {}
    try:
        files = find_images(args.images, args.max_images)
        for label, (config, checkpoint) in zip(labels, models):
            model = load_model(config, checkpoint, device)
            results[label] = measure_similarity(model, files, size, args.batch_size)
            maps[label] = observe_image(model, files[0], args.points, size)
    except (FileNotFoundError, TypeError, ValueError) as error:
        sys.exit(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'similarity.json').write_text(json.dumps(results, indent=1) + '\n')
    write_csv(similarity_rows(results), args.out / 'similarity.csv')
    plot_similarity(results, args.out / 'similarity.png')
    image = read_image(files[0], size)[..., ::-1]
    whole = {label: each for label, each in maps.items() if each.attention}
    if whole:
        plot_attention(whole, image, args.points, args.heads, args.out / 'attention.png')
    plot_features(maps, image, args.out / 'features.png')
    means = mean_rows(results, f'mean over layers and {len(files)} images')
    print(f'\n{markdown_table(means)}\n\nwritten to {args.out}')


if __name__ == '__main__':
    main()
