"""Makes a checkpoint fit to be published.

    python tools/publish_model.py work_dirs/lavit_t_in1k/epoch_300.pth lavit_t_in1k.pth

Keeps the weights alone, without optimizer and log, in plain types that torch's safe
loader reads without mmlavit. After training with EMAHook they are the moving
average, which is what was validated. Adds the config, without the paths of this machine
that mmengine adds, and the figures of this checkpoint's validation, or of ``--results``,
the JSON of a test; and puts the first 8 digits of the file's SHA-256 into its name, as
torch.hub checks it: ``lavit_t_in1k-1a2b3c4d.pth``.
"""
import argparse
import json
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'checkpoint', type=Path,
        help='of tools/train.py; e.g. work_dirs/lavit_t_in1k/epoch_300.pth')
    parser.add_argument(
        'target', type=Path, help='path without the hash; e.g. lavit_t_in1k.pth')
    parser.add_argument(
        '--results', type=Path, metavar='FILE',
        help='JSON that tools/test.py wrote; default: what the log beside the '
        'checkpoint has of its validation; e.g. --results '
        'work_dirs/test/20250101_000000/20250101_000000.json')
    parser.add_argument(
        '--half', action='store_true',
        help='store weights in float16, in half the space, if the backbone\'s maps '
        'change by at most 1e-2 of their largest value; default: as trained; '
        'e.g. --half')
    args = parser.parse_args()
    for path in (args.checkpoint, args.results):
        if path is not None and not path.is_file():
            parser.error(f'{path}: no such file')
    return args


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    from mmlavit.checkpoints.publish import publish
    from mmlavit.engine.safe_loading import load_from_local
    try:
        figures = json.loads(args.results.read_text()) if args.results else None
    except ValueError as error:
        sys.exit(f'--results {args.results}: expected JSON of tools/test.py: {error}')
    try:
        final = publish(args.checkpoint, args.target, figures, args.half)
    except ValueError as error:
        sys.exit(str(error))
    figures = load_from_local(str(final))['meta']['figures']
    print(f'{final}: {final.stat().st_size / 1e6:.1f} MB, figures: '
          f'{figures or "none found"}')


if __name__ == '__main__':
    main()
