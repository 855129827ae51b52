"""Makes a checkpoint fit to be published.

    python tools/publish_model.py work_dirs/lavit_t_in1k/epoch_300.pth lavit_t_in1k.pth

Keeps the weights alone, without optimizer and log, in plain types that torch's safe
loader reads without mmlavit. After training with EMAHook they are the moving
average, which is what was validated. Adds the config and the figures of this
checkpoint's validation, or of ``--results``, the JSON of a test; and puts the first
8 digits of the file's SHA-256 into its name, as torch.hub checks it:
``lavit_t_in1k-1a2b3c4d.pth``.
"""
import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Optional

import torch

import mmlavit
from mmlavit.checkpoints import load_from_local, plain
from mmlavit.logs import read_scalars


def load(path: Path) -> dict:
    """A checkpoint, by the safe loader."""
    try:
        checkpoint = load_from_local(str(path), map_location='cpu')
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error))
    if 'state_dict' not in checkpoint:
        raise SystemExit(f'{path}: no state_dict in it: expected a checkpoint '
                         'of tools/train.py')
    return checkpoint


def publish(source: Path, target: Path,
            results: Optional[dict] = None) -> Path:
    """Writes the published file; returns its path."""
    checkpoint = load(source)
    weights = checkpoint['state_dict']
    meta = checkpoint.get('meta', {})
    figures = (validation_of(source, meta) if results is None else
               plain(results))
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
    print(f'{final}: {final.stat().st_size / 1e6:.1f} MB, figures: '
          f'{figures or "none found"}')
    return final


def validation_of(checkpoint: Path, meta: dict) -> dict:
    """The figures of a checkpoint's validation, from the log beside it."""
    # Validations are logged by epoch, or by iteration where there are none.
    step = meta.get('epoch') or meta.get('iter')
    found = [values for values in read_scalars(checkpoint.parent)
             if 'loss' not in values and values.get('step') == step]
    return {key: value for key, value in (found[-1] if found else {}).items()
            if key not in ('time', 'data_time')}


def main(args: Optional[list] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('target', type=Path, help='path without the hash')
    parser.add_argument(
        '--results',
        type=Path,
        help="JSON that tools/test.py wrote; default: the training log's "
        'validation of this checkpoint')
    args = parser.parse_args(args)
    if not args.checkpoint.is_file():
        raise SystemExit(f'{args.checkpoint}: no such file')
    publish(args.checkpoint, args.target,
            json.loads(args.results.read_text()) if args.results else None)


if __name__ == '__main__':
    main()
