"""Does a converted network recover? Less attention put into a trained PVTv2.

    python stress/recovery.py DATA OUT
    python stress/recovery.py DATA OUT --seeds 0 1 2

DATA has class folders of 64 x 64 images in ``train`` and ``val``, such as those of
Tiny-ImageNet. Trains mmdetection's PVTv2, narrow, then puts less attention into its
deepest layers and fine-tunes. Run it again to go on where it was cut off.

Writes OUT/table.md, OUT/curve.png and OUT/results.json: top-1 at once, after 1 epoch and
at the end, with Theta and Psi at the identity and fitted to the dropped layers'
attention. The stock network is fine-tuned as long. A control has uniform maps in the same
layers, at once; another has them in all layers. Speeds over the stock network's, of
inference and of training steps, are measured at the end: keep the machine quiet then.
"""
import argparse
import json
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor, nn

from mmlavit import LaViT
from mmlavit.analysis.complexity import count_macs
from mmlavit.analysis.report import markdown_table
from mmlavit.analysis.timing import Spread, time_in_turn
from mmlavit.checkpoints.fit import MEAN, STD, fit, make_teacher

# Narrow, and of strides that leave 4 x 4 = 16 keys in every stage of a 64 px image.
ARCH = dict(
    embed_dims=(32, 64, 128, 192), depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 6),
    num_va_layers=(2, 2, 6, 2), mlp_ratios=(4, 4, 4, 4), strides=(4, 2, 2, 1),
    trunk_norm=True, attn_residual=False)
RATIOS = (4, 2, 1, 1)
# VA layers by the number of LA layers, deepest first; stages begin with VA.
VA_LAYERS = {1: (2, 2, 6, 1), 3: (2, 2, 4, 1), 6: (2, 2, 1, 1)}
# Of the controls, the last of which has uniform maps in all layers.
ALL_LAYERS = sum(ARCH['depths'])
CONTROLS = {**VA_LAYERS, ALL_LAYERS: (0, 0, 0, 0)}
BATCH = 128
SIZE = 64


class Data(NamedTuple):
    """Images (n, 3, 64, 64), uint8, and their classes (n, )."""
    images: Tensor
    classes: Tensor


class Run(NamedTuple):
    """One training: what is trained, and for how long."""
    name: str
    epochs: int
    lr: float
    seed: int


class Classifier(nn.Module):
    """A linear layer on the mean of a backbone's last map."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(ARCH['embed_dims'][-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1].mean((2, 3)))


def read(folder: Path, per_class: Optional[int] = None) -> Data:
    """The first ``per_class`` images of each class, None for all, at 64 x 64."""
    images, classes = [], []
    for i, name in enumerate(sorted(path.name for path in folder.iterdir())):
        for path in sorted((folder / name).iterdir())[:per_class]:
            image = cv2.resize(cv2.imread(str(path)), (SIZE, SIZE))
            images.append(image[..., ::-1].transpose(2, 0, 1))
            classes.append(i)
    return Data(torch.from_numpy(np.stack(images)), torch.tensor(classes))


def normalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (images.float() - mean) / std


def augment(images: Tensor, random: torch.Generator, pad: int = 8) -> Tensor:
    """Random crops and flips of a batch (B, 3, H, W)."""
    size = images.shape[2]
    padded = F.pad(images, (pad, ) * 4)
    tops, lefts = torch.randint(2 * pad + 1, (2, len(images)), generator=random)
    flips = torch.rand(len(images), generator=random) < .5
    crops = [x[:, t:t + size, l:l + size]
             for x, t, l in zip(padded, tops.tolist(), lefts.tolist())]
    return torch.stack([x.flip(2) if flip else x for x, flip in zip(crops, flips)])


@torch.no_grad()
def top1(model: nn.Module, data: Data) -> float:
    """Accuracy in per cent."""
    model.eval()
    right = sum((model(normalise(x)).argmax(1) == y).sum().item()
                for x, y in zip(data.images.split(500), data.classes.split(500)))
    return 100 * right / len(data.classes)


def train(model: nn.Module, run: Run, data: Data, held_out: Data,
          out: Path) -> List[float]:
    """Trains, from the last whole epoch on; top-1 after each epoch."""
    steps = len(data.images) // BATCH * run.epochs
    optimizer = torch.optim.AdamW(model.parameters(), run.lr, weight_decay=.05,
                                  foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, run.lr, steps, pct_start=.1, cycle_momentum=False)
    state = dict(model=model, optimizer=optimizer, schedule=schedule)
    path, accuracies = out / f'{run.name}.pth', []
    if path.is_file():
        saved = torch.load(path)
        accuracies = saved['accuracies']
        for name, part in state.items():
            part.load_state_dict(saved[name])
    for epoch in range(len(accuracies), run.epochs):
        random = torch.Generator().manual_seed(1000 * run.seed + epoch)
        order = torch.randperm(len(data.images), generator=random)
        model.train()
        for chosen in order.split(BATCH):
            if len(chosen) < BATCH:
                break
            images = normalise(augment(data.images[chosen], random))
            loss = F.cross_entropy(model(images), data.classes[chosen])
            dp_loss = getattr(model.backbone, 'dp_loss', None)
            if dp_loss is not None:
                loss = loss + dp_loss.take()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.)
            optimizer.step()
            schedule.step()
        accuracies.append(top1(model, held_out))
        print(f'{run.name}: epoch {epoch + 1} of {run.epochs}, '
              f'top-1 {accuracies[-1]:.2f}', flush=True)
        part = path.with_suffix('.part')
        torch.save({'accuracies': accuracies,
                    **{name: x.state_dict() for name, x in state.items()}}, part)
        part.replace(path)
    return accuracies


def stock(num_classes: int) -> Classifier:
    from mmdet.models.backbones import PyramidVisionTransformerV2
    torch.manual_seed(0)
    backbone = PyramidVisionTransformerV2(
        embed_dims=ARCH['embed_dims'][0], num_layers=ARCH['depths'],
        num_heads=ARCH['num_heads'], mlp_ratios=ARCH['mlp_ratios'],
        strides=ARCH['strides'], sr_ratios=RATIOS)
    backbone.init_weights()
    return Classifier(backbone, num_classes)


def with_la_layers(la_layers: int) -> LaViT:
    return LaViT(ARCH, num_va_layers=VA_LAYERS[la_layers], sr_ratios=RATIOS,
                 pretrain_img_size=SIZE)


def convert(teacher: Classifier, la_layers: int,
            fitted_to: Optional[Sequence[Tensor]]) -> Tuple[Classifier, dict]:
    """The teacher with less attention; the fitted maps' divergences."""
    weights = teacher.backbone.state_dict()
    backbone = with_la_layers(la_layers)
    backbone.load_state_dict(dict(weights), strict=False)
    fitted = {}
    if fitted_to is not None:
        for layer in fit(backbone, make_teacher(dict(weights), backbone), fitted_to):
            fitted[layer.name] = [layer.before, layer.after]
    model = Classifier(backbone, teacher.head.out_features)
    model.head.load_state_dict(teacher.head.state_dict())
    return model, fitted


def with_uniform_maps(teacher: Classifier, la_layers: int) -> Classifier:
    """The teacher with uniform attention in its ``la_layers`` deepest: a control."""
    model = Classifier(
        LaViT(ARCH, sr_ratios=RATIOS, pretrain_img_size=SIZE),
        teacher.head.out_features)
    model.backbone.load_state_dict(dict(teacher.backbone.state_dict()))
    model.head.load_state_dict(teacher.head.state_dict())
    for stage, num_va in zip(model.backbone.stages, CONTROLS[la_layers]):
        for block in stage.blocks[num_va:]:
            for weight in block.attn.q.parameters():
                nn.init.zeros_(weight)
    return model


def fine_tune(teacher: Classifier, la_layers: int, fits: bool, seed: int,
              args: argparse.Namespace, data: Data, held_out: Data) -> dict:
    """One row of the table."""
    name = f'la{la_layers}{"-fitted" if fits else ""}-seed{seed}'
    path = args.out / f'{name}.json'
    if path.is_file():
        return json.loads(path.read_text())
    model, fitted = stock(teacher.head.out_features), {}
    if la_layers:
        images = data.images[::max(1, len(data.images) // 256)][:256]
        model, fitted = convert(
            teacher, la_layers,
            list(normalise(images).split(32)) if fits else None)
    else:
        model.load_state_dict(teacher.state_dict())
    result = dict(
        la_layers=la_layers, fitted=fits, seed=seed, divergences=fitted,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        macs=count_macs(model.backbone, (SIZE, SIZE)) / 1e6,
        at_once=top1(model, held_out))
    print(f'{name}: at once {result["at_once"]:.2f} {fitted}', flush=True)
    result['epochs'] = train(
        model, Run(name, args.tune_epochs, args.tune_lr, seed), data, held_out,
        args.out)
    path.write_text(json.dumps(result))
    (args.out / f'{name}.pth').unlink()
    return result


def speeds(num_classes: int, trains: bool, rounds: int) -> Dict[int, str]:
    """Over the stock network's, in turn, by the number of LA layers.

    Args:
        num_classes (int): Of the classifiers, whose weights are random.
        trains (bool): A training step instead of inference.
        rounds (int): At least 2.

    Returns:
        dict[int, str]: Median, and in brackets the 10th and 90th percentile.
    """
    images, classes = torch.randn(BATCH, 3, SIZE, SIZE), torch.zeros(BATCH).long()

    def step(model: nn.Module):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, foreach=True)
        model.train(trains)

        def infer() -> None:
            with torch.no_grad():
                model(images)

        def learn() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), classes).backward()
            optimizer.step()

        return learn if trains else infer

    models = {0: stock(num_classes), **{
        n: Classifier(with_la_layers(n), num_classes) for n in VA_LAYERS}}
    times = time_in_turn(
        {str(n): step(model) for n, model in models.items()}, rounds, 3, 'cpu')
    ratios = {n: Spread.of([a / b for a, b in zip(times['0'], times[str(n)])])
              for n in models}
    return {n: f'{x.median:.2f} ({x.p10:.2f}-{x.p90:.2f})' for n, x in ratios.items()}


def spread(values: Sequence[float]) -> str:
    """Mean, and with several seeds the standard deviation."""
    mean = f'{np.mean(values):.1f}'
    return mean if len(values) == 1 else f'{mean} ± {np.std(values, ddof=1):.1f}'


def write_report(results: List[dict], controls: Dict[int, float],
                 ratios: Dict[str, Dict[int, str]], out: Path) -> None:
    """The table, the plot and all figures.

    Args:
        results (list[dict]): Of `fine_tune`.
        controls (dict[int, float]): Top-1 with uniform maps, by the number of layers.
        ratios (dict[str, dict[int, str]]): Of `speeds`, by column.
        out (Path): The folder.
    """
    groups: Dict[Tuple[int, bool], List[dict]] = {}
    for result in results:
        groups.setdefault((result['la_layers'], result['fitted']), []).append(result)
    rows = []
    for (la_layers, fitted), runs in groups.items():
        epochs = np.array([run['epochs'] for run in runs])
        rows.append({
            'LA layers': la_layers,
            'Theta and Psi begin': ('fitted' if fitted else 'at the identity')
            if la_layers else '',
            'parameters, M': f'{runs[0]["parameters"]:.2f}',
            'MACs, M': f'{runs[0]["macs"]:.1f}',
            **{name: ratio[la_layers] for name, ratio in ratios.items()},
            'uniform maps there': f'{controls[la_layers]:.1f}' if la_layers else '',
            'at once': spread([run['at_once'] for run in runs]),
            'after 1 epoch': spread(epochs[:, 0]),
            f'after {epochs.shape[1]}': spread(epochs[:, -1]),
        })
        style = dict(linestyle='--') if fitted else {}
        plt.plot(range(epochs.shape[1] + 1),
                 [np.mean([run['at_once'] for run in runs]), *epochs.mean(0)],
                 color=f'C{list(VA_LAYERS).index(la_layers) + 1 if la_layers else 0}',
                 label=f'{la_layers} LA layers{", fitted" if fitted else ""}'
                 if la_layers else 'stock', **style)
    table = (f'{markdown_table(rows)}\n\nUniform maps in all {ALL_LAYERS} layers, at '
             f'once: {controls[ALL_LAYERS]:.1f}')
    (out / 'table.md').write_text(table + '\n')
    (out / 'results.json').write_text(json.dumps(results, indent=1))
    plt.xlabel('epochs of fine-tuning')
    plt.ylabel('top-1, %')
    plt.legend()
    plt.tight_layout()
    plt.savefig(out / 'curve.png', dpi=110)
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, help='folder with train and val')
    parser.add_argument('out', type=Path, help='folder for what is written')
    parser.add_argument('--per-class', type=int, default=200,
                        help='images a class; default %(default)s; '
                        'e.g. --per-class 500')
    parser.add_argument('--epochs', type=int, default=20,
                        help='of the stock network; default %(default)s; '
                        'e.g. --epochs 60')
    parser.add_argument('--lr', type=float, default=1e-3,
                        help='of the stock network; default %(default)s; '
                        'e.g. --lr 5e-4')
    parser.add_argument('--tune-epochs', type=int, default=5,
                        help='of fine-tuning; default %(default)s; '
                        'e.g. --tune-epochs 10')
    parser.add_argument('--tune-lr', type=float, default=2e-4,
                        help='of fine-tuning; default %(default)s; '
                        'e.g. --tune-lr 1e-4')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0],
                        help='of fine-tuning; default 0; e.g. --seeds 0 1 2')
    parser.add_argument('--rounds', type=int, default=20,
                        help='of measuring speed, at least 2; default %(default)s; '
                        'e.g. --rounds 50')
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    data = read(args.data / 'train', args.per_class)
    held_out = read(args.data / 'val')
    teacher = stock(len(data.classes.unique()))
    train(teacher, Run('stock', args.epochs, args.lr, 0), data, held_out, args.out)
    teacher.eval()
    rows = [(0, False), *((n, fits) for n in VA_LAYERS for fits in (False, True))]
    results = [
        fine_tune(teacher, n, fits, seed, args, data, held_out)
        for seed in args.seeds for n, fits in rows
    ]
    controls = {n: top1(with_uniform_maps(teacher, n), held_out) for n in CONTROLS}
    ratios = {
        f'speed, {name}': speeds(len(data.classes.unique()), trains, args.rounds)
        for name, trains in (('inference', False), ('training', True))}
    write_report(results, controls, ratios, args.out)


if __name__ == '__main__':
    main()
