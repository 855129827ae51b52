"""Makes a checkpoint fit to be published.

    python tools/publish_model.py work_dirs/lavit_t_in1k/epoch_300.pth lavit_t_in1k.pth \
        --results work_dirs/lavit_t_in1k/test/*/*.json

Keeps the weights alone (``--ema``: their moving average), without optimizer and
log, in plain types that torch's safe loader reads without mmlavit; adds the
config and the figures; and puts the first 8 digits of the file's SHA-256 into its
name, as torch.hub checks it: ``lavit_t_in1k-1a2b3c4d.pth``.
"""
import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Optional

import torch

import mmlavit


def plain(x):
    """Nested containers of Python's own types; None for what has no such form."""
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if hasattr(x, 'tolist'):
        return x.tolist()
    return x if isinstance(x, (str, int, float, bool)) else None


def load(path: Path) -> dict:
    """A checkpoint, by the safe loader."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        raise SystemExit(f'{path}: not a checkpoint that the safe loader reads '
                         f'({type(error).__name__}: {error})')
    if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint:
        raise SystemExit(f'{path}: no state_dict in it: expected a checkpoint '
                         'of tools/train.py')
    return checkpoint


def publish(source: Path, target: Path, figures: dict,
            ema: bool = False) -> Path:
    """Writes the published file; returns its path."""
    checkpoint = load(source)
    weights = checkpoint['state_dict']
    if ema:
        if 'ema_state_dict' not in checkpoint:
            raise SystemExit(f'{source}: --ema, but no moving average in it: '
                             'train with EMAHook')
        weights = {
            name[len('module.'):]: value
            for name, value in checkpoint['ema_state_dict'].items()
            if name.startswith('module.')
        }
    meta = checkpoint.get('meta', {})
    kept = {
        key: plain(meta[key])
        for key in ('cfg', 'dataset_meta', 'epoch', 'iter', 'experiment_name')
        if key in meta
    }
    published = dict(
        meta=dict(kept, mmlavit_version=mmlavit.__version__, figures=figures),
        state_dict={k: v.clone() for k, v in weights.items()})
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f'{target.name}.part')
    torch.save(published, part)
    sha = hashlib.sha256(part.read_bytes()).hexdigest()
    final = target.with_name(f'{target.stem}-{sha[:8]}.pth')
    os.replace(part, final)
    return final


def last_figures(checkpoint: Path) -> dict:
    """The latest validation's figures in the log beside a checkpoint."""
    figures = {}
    logs = checkpoint.parent.glob('*/vis_data/scalars.json')
    for log in sorted(logs):  # named by time
        for line in log.read_text().splitlines():
            values = json.loads(line)
            if 'loss' not in values:
                figures = values
    return figures


def main(args: Optional[list] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('target', type=Path, help='path without the hash')
    parser.add_argument(
        '--results',
        type=Path,
        help="JSON of tools/test.py; without it the training log's last "
        'validation')
    parser.add_argument(
        '--ema', action='store_true', help='the moving average of the weights')
    args = parser.parse_args(args)
    if not args.checkpoint.is_file():
        raise SystemExit(f'{args.checkpoint}: no such file')
    figures = (json.loads(args.results.read_text())
               if args.results else last_figures(args.checkpoint))
    final = publish(args.checkpoint, args.target, plain(figures), args.ema)
    print(f'{final}: {final.stat().st_size / 1e6:.1f} MB, figures: '
          f'{figures or "none found"}')


if __name__ == '__main__':
    main()
