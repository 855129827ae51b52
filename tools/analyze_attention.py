"""How alike a model's attention maps and tokens are, by depth, and pictures of them.

    python tools/analyze_attention.py CONFIG CHECKPOINT IMAGES --out DIR
    python tools/analyze_attention.py CONFIG CHECKPOINT IMAGES --compare CONFIG CHECKPOINT

For classifiers, detectors and segmentors with LaViT, and mmpretrain's ViT and DeiT.
IMAGES is a folder (searched through) or a file. CHECKPOINT may be ``none``: initial
weights. Writes to DIR:

    similarity.json, .csv   every measure of every layer; maps, each layer to each
    similarity.png          the same as curves and matrices
    attention.png           where chosen points of the first image look, by layer
    features.png            the stages' feature maps
    (.png with both models where --compare is given)
"""
import argparse
import csv
import json
import logging
from pathlib import Path
from typing import Dict, List, Optional

import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from torch import nn
from tqdm import tqdm

import mmlavit  # noqa: F401  (registers LaViT)
from mmlavit.analysis import MEASURES, Similarity, observe_layers
from mmlavit.building import build_model

SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff'}
TITLES = dict(
    map_similarity_to_previous="maps: cosine to the layer before",
    head_similarity='maps: cosine between heads',
    token_similarity='tokens: mean pairwise cosine',
    asymmetry='asymmetry of the map (DP condition 1)',
    diagonal_largest='rows with the largest diagonal (DP condition 2)')


def build(config: str, checkpoint: str, device: str) -> nn.Module:
    """The model of a config, in eval mode."""
    torch.manual_seed(0)
    model = build_model(Config.fromfile(config))
    model.init_weights()
    if checkpoint != 'none':
        try:
            # Quiet: of a whole model, only the backbone is looked at.
            loaded = load_checkpoint(model, checkpoint, map_location='cpu',
                                     logger=logging.getLogger('quiet'))
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(f'{checkpoint}: {error}')
        if not model.backbone.state_dict(prefix='backbone.').keys() & (
                loaded.get('state_dict', loaded).keys()):
            raise SystemExit(f'{checkpoint}: none of its weights are of the '
                             f'backbone of {config}')
    return model.eval().to(device)


def find_images(path: Path, limit: int) -> List[Path]:
    """Image files, spread evenly over the folder if there are more than limit."""
    files = [path] if path.is_file() else sorted(
        file for file in path.rglob('*') if file.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f'{path}: no images there ({", ".join(SUFFIXES)})')
    count = min(limit, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def prepare(model: nn.Module, files: List[Path], size: tuple) -> torch.Tensor:
    """Files as the model's own preprocessor leaves them: (B, 3, H, W)."""
    images = []
    for file in files:
        try:
            image = mmcv.imread(file)
        except Exception:
            image = None
        if image is None:
            raise SystemExit(f'{file}: not a readable image')
        image = mmcv.imresize(image, size[::-1])
        images.append(torch.from_numpy(image).permute(2, 0, 1).contiguous())
    data = model.data_preprocessor(dict(inputs=images), training=False)
    return data['inputs']


@torch.no_grad()
def measure(model: nn.Module, files: List[Path], args) -> dict:
    """All measures, averaged over the images."""
    similarity = Similarity()
    batches = range(0, len(files), args.batch_size)
    for i in tqdm(batches, 'images', disable=None):
        inputs = prepare(model, files[i:i + args.batch_size], args.size)
        with similarity.observe(model):
            model.backbone(inputs)
    return similarity.result()


@torch.no_grad()
def look(model: nn.Module, file: Path, points: List[tuple], size: tuple):
    """Of one image: maps of the points, and the stages' feature maps.

    Returns:
        tuple: (layer's name, kind, maps (points, heads, h, w)) for every layer,
        and the mean magnitude (h, w) of the last layer's tokens in every stage.
    """
    maps, features = [], {}

    def callback(layer) -> None:
        height, width = layer.grid
        queries = [int(y * height) * width + int(x * width) for x, y in points]
        attn = layer.attention_of(queries)[0].transpose(0, 1)
        maps.append((layer.name, layer.kind,
                     attn.unflatten(2, layer.key_grid).float().cpu()))
        features[layer.stage] = layer.tokens[0].float().norm(dim=1).view(
            layer.grid).cpu()

    with observe_layers(model, callback):
        model.backbone(prepare(model, [file], size))
    return maps, list(features.values())


def plot_similarity(results: Dict[str, dict], out: Path) -> None:
    """Curves of the measures by depth; a matrix of the maps for each model."""
    fig = Figure(figsize=(19, 8.5))
    axes = fig.subplots(2, 4).ravel()
    for ax, measure_name in zip(axes, MEASURES):
        for label, result in results.items():
            values = [layer[measure_name] for layer in result['layers']]
            x = [i for i, v in enumerate(values) if v is not None]
            line, = ax.plot(x, [values[i] for i in x], '-', label=label)
            for kind, marker in (('VA', 'o'), ('LA', '^'), ('ViT', 's')):
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
        ax.set_ylim(*((None, None) if measure_name == 'asymmetry' else
                      (min(0, ax.get_ylim()[0]), 1.03)))
        ax.grid(alpha=.3)
    axes[0].legend(fontsize=10)
    for ax, (label, result) in zip(axes[len(MEASURES):], results.items()):
        matrix = np.array(result['map_similarity'], dtype=float)
        image = ax.imshow(matrix, vmin=0, vmax=1, cmap='viridis')
        ax.set_title(f'maps, each layer to each: {label}', fontsize=11)
        fig.colorbar(image, ax=ax, fraction=.046)
    for ax in axes[len(MEASURES) + len(results):]:
        ax.axis('off')
    fig.tight_layout()
    fig.savefig(out, dpi=80)


def plot_attention(looks: Dict[str, tuple], file: Path, points: List[tuple],
                   size: tuple, heads: bool, out: Path) -> None:
    """A row for every point (and head), a column for every layer."""
    image = mmcv.imresize(mmcv.imread(file), size[::-1])[..., ::-1]
    rows = []  # (label, point, maps of each layer)
    for label, (maps, _) in looks.items():
        for p, point in enumerate(points):
            most = max(m.shape[1] for *_, m in maps) if heads else 1
            for h in range(most):
                cells = [
                    (m[p, h] if h < m.shape[1] else None)
                    if heads else m[p].mean(0) for *_, m in maps
                ]
                name = f'{label}\nhead {h}' if heads else label
                rows.append((name, point, maps, cells))
    columns = max(len(row[3]) for row in rows)
    fig = Figure(figsize=(1.5 * columns + 1.5, 1.65 * len(rows)))
    axes = fig.subplots(len(rows), columns + 1, squeeze=False)
    for ax in axes.ravel():
        ax.axis('off')
    for (name, point, maps, cells), line in zip(rows, axes):
        line[0].imshow(image)
        line[0].set_title(name, fontsize=8)
        for i, cell in enumerate(cells):
            if cell is None:
                continue
            ax = line[i + 1]
            ax.imshow(image)
            overlay = F.interpolate(cell[None, None], size, mode='bilinear')
            ax.imshow(overlay[0, 0], cmap='inferno', alpha=.65)
            kind = maps[i][1]
            short = '.'.join(
                x for x in maps[i][0].split('.') if x.isdigit())
            ax.set_title(f'{short} {kind}', fontsize=8)
        for ax, used in zip(line, [True, *(c is not None for c in cells)]):
            if used:
                ax.plot(point[0] * size[1], point[1] * size[0], '+',
                        color='cyan', ms=8, mew=1.5)
    fig.tight_layout(pad=.3)
    fig.savefig(out, dpi=75, bbox_inches='tight')


def plot_features(looks: Dict[str, tuple], file: Path, size: tuple,
                  out: Path) -> None:
    """The magnitude of the tokens at the end of each stage."""
    image = mmcv.imresize(mmcv.imread(file), size[::-1])[..., ::-1]
    columns = max(len(features) for _, features in looks.values())
    fig = Figure(figsize=(2.2 * columns + 2.2, 2.4 * len(looks)))
    axes = fig.subplots(len(looks), columns + 1, squeeze=False)
    for ax in axes.ravel():
        ax.axis('off')
    for (label, (_, features)), line in zip(looks.items(), axes):
        line[0].imshow(image)
        line[0].set_title(label, fontsize=9)
        for i, feature in enumerate(features):
            line[i + 1].imshow(feature, cmap='viridis')
            line[i + 1].set_title(f'stage {i}', fontsize=9)
    fig.tight_layout(pad=.3)
    fig.savefig(out, dpi=75)


def write(results: Dict[str, dict], out: Path) -> None:
    (out / 'similarity.json').write_text(json.dumps(results, indent=1) + '\n')
    with open(out / 'similarity.csv', 'w', newline='') as file:
        columns = ['model', 'layer', 'name', 'stage', 'kind', *MEASURES]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for label, result in results.items():
            for layer in result['layers']:
                writer.writerow(dict(layer, model=label))


def point(text: str) -> tuple:
    x, y = (float(value) for value in text.split(','))
    if not (0 <= x < 1 and 0 <= y < 1):
        raise argparse.ArgumentTypeError(
            f'{text}: expected X,Y as shares of width and height, below 1')
    return x, y


def parse_args(args: Optional[list]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint', help="file, or 'none' for initial weights")
    parser.add_argument('images', type=Path, help='folder or file')
    parser.add_argument('--compare', nargs=2, metavar=('CONFIG', 'CHECKPOINT'))
    parser.add_argument('--labels', nargs='+', help="the models' names in plots")
    parser.add_argument('--out', type=Path, default=Path('work_dirs/analysis'))
    parser.add_argument('--size', type=int, nargs=2, default=(224, 224),
                        metavar=('H', 'W'),
                        help='input size, default 224 224; rounded up to 32')
    parser.add_argument('--max-images', type=int, default=64)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--points', type=point, nargs='+', metavar='X,Y',
                        default=[(.5, .5), (.2, .2)],
                        help='query points, shares of width and height')
    parser.add_argument('--heads', action='store_true',
                        help='attention of each head, not their mean')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available()
                        else 'cpu')
    args = parser.parse_args(args)
    if args.labels and len(args.labels) != 1 + bool(args.compare):
        parser.error(f'--labels {" ".join(args.labels)}: expected one for each of '
                     f'the {1 + bool(args.compare)} models')
    return args


def main(args: Optional[list] = None) -> None:
    args = parse_args(args)
    # Detectors pad to that; so that pictures and maps are of the same area.
    args.size = tuple(-(-side // 32) * 32 for side in args.size)
    logging.disable(logging.INFO)
    logging.getLogger('quiet').setLevel(logging.CRITICAL)
    files = find_images(args.images, args.max_images)
    models = [(args.config, args.checkpoint)]
    if args.compare:
        models.append(tuple(args.compare))
    labels = args.labels or [Path(config).stem for config, _ in models]
    if len(set(labels)) < len(models):
        labels = [f'{label} ({i})' for i, label in enumerate(labels, 1)]
    results, looks = {}, {}
    for label, (config, checkpoint) in zip(labels, models):
        model = build(config, checkpoint, args.device)
        results[label] = measure(model, files, args)
        looks[label] = look(model, files[0], args.points, args.size)
    args.out.mkdir(parents=True, exist_ok=True)
    write(results, args.out)
    plot_similarity(results, args.out / 'similarity.png')
    plot_attention(looks, files[0], args.points, args.size, args.heads,
                   args.out / 'attention.png')
    plot_features(looks, files[0], args.size, args.out / 'features.png')
    for label, result in results.items():
        print(f'\n{label}: means over {result["images"]} images')
        for name in MEASURES:
            values = [layer[name] for layer in result['layers']
                      if layer[name] is not None]
            mean = f'{sum(values) / len(values):.3f}' if values else '-'
            print(f'  {TITLES[name]:<50} {mean}')
    print(f'\nwritten to {args.out}')


if __name__ == '__main__':
    main()
