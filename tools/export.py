"""Exports a trained model as an ONNX file, or as a .pt2 program of torch.export.

    python tools/export.py CONFIG CHECKPOINT model.onnx --verify
    python tools/export.py CONFIG CHECKPOINT model.pt2
    python tools/export.py CONFIG CHECKPOINT detector.onnx --part end-to-end --verify

Takes any batch size, height and width (sides of at least 33 pixels). ONNX files are of
standard operators alone, opset 20; tools/infer_onnx.py runs them. Both kinds of file hold
class names and preprocessing. Without a checkpoint: initial weights.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional

# Of the largest value; and the share of a detector's boxes that is compared.
TOLERANCES = dict(float32=(1e-4, 1.), half=(1e-2, .98))
MOST_IMAGES = 64  # that int8 is calibrated with


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'config', type=Path, help='e.g. configs/retinanet_lavit_digits.py')
    parser.add_argument(
        'checkpoint', type=Path, nargs='?',
        help='default: initial weights; e.g. work_dirs/demo/epoch_6.pth')
    parser.add_argument(
        'out', type=Path, help='.onnx or .pt2 file to write; e.g. model.onnx')
    parser.add_argument(
        '--part', choices=('model', 'backbone', 'end-to-end'), default='model',
        help="default: model, up to the head's outputs (logits, or scores and "
        'deltas of every anchor); end-to-end: a detector with decoding and NMS; '
        'e.g. --part end-to-end')
    parser.add_argument(
        '--half', action='store_true',
        help='store weights in float16, in half the space; runtimes still compute '
        'in float32; default: float32; e.g. --half')
    parser.add_argument(
        '--verify', action='store_true',
        help='compare the file with the model at four other sizes, and exit with 1 '
        f'beyond {TOLERANCES["float32"][0]} of the largest value '
        f'({TOLERANCES["half"][0]} with --half); default: off; e.g. --verify')
    parser.add_argument(
        '--runtime', choices=('onnxruntime', 'openvino'),
        help='what --verify runs an ONNX file with; default: onnxruntime; '
        'e.g. --runtime openvino')
    parser.add_argument(
        '--int8', type=Path, metavar='IMAGES',
        help='linear layers in int8, calibrated with some images of this folder; '
        'default: float32; e.g. --int8 data/digits/images/train')
    # So that options may stand between CONFIG, CHECKPOINT and OUT.
    args = parser.parse_intermixed_args()
    for path in (args.config, args.checkpoint):
        if path is not None and not path.is_file():
            parser.error(f'{path}: no such file')
    if args.out.suffix not in ('.onnx', '.pt2'):
        parser.error(f'{args.out}: expected a name that ends in .onnx or .pt2')
    if args.runtime and (not args.verify or args.out.suffix != '.onnx'):
        parser.error('--runtime: expected --verify and an .onnx file with it')
    if (args.half or args.int8) and args.out.suffix != '.onnx':
        parser.error(f'--half, --int8: {args.out}: expected an .onnx file')
    if args.int8 and (args.half or args.verify or args.part == 'backbone'):
        parser.error('--int8 takes no --half, no --verify (measure the accuracy '
                     'instead), and no --part backbone')
    if args.int8 and not args.int8.exists():
        parser.error(f'--int8 {args.int8}: no such file or folder')
    return args


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    from mmlavit.export import programs
    try:
        part, about = load_part(args.config, args.checkpoint, args.part)
        # Before the export, which takes a while.
        images = find_calibration(args.int8, about) if args.int8 else []
        print(f'exporting {args.part} of {args.config}: {part.task}', flush=True)
        program = programs.export_program(part)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        # A file that is there stays as it is until the new one is whole.
        with tempfile.TemporaryDirectory(prefix='.', dir=args.out.parent) as folder:
            made = Path(folder) / args.out.name
            if args.out.suffix == '.pt2':
                programs.to_pt2(program, made, about)
            else:
                write_onnx(program, part, made, about, args.half, images)
            made.replace(args.out)
        print(f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB')
        if args.verify:
            runtime = ('torch' if args.out.suffix == '.pt2' else
                       args.runtime or 'onnxruntime')
            verify(part, args.out, runtime,
                   *TOLERANCES['half' if args.half else 'float32'])
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(str(error))


def load_part(config: Path, checkpoint: Optional[Path], part: str) -> tuple:
    """A part of a config's model; and what the file says of it, as JSON by name."""
    import mmlavit  # noqa: F401  (registers LaViT)
    from mmlavit.analysis.building import (build_model, class_names, load_weights,
                                           quiet, read_config)
    from mmlavit.export import choose, metadata
    config = read_config(config)
    with quiet():
        model = build_model(config)
        names = class_names(config, load_weights(model, checkpoint))
    chosen = choose.choose_part(model, part)
    return chosen, metadata.describe(chosen, model, config, names)


def write_onnx(program, part, out: Path, about: Dict[str, str], half: bool,
               images: List[Path]) -> None:
    """Writes the file and prints its operators."""
    from mmlavit.export import programs, shrink
    programs.to_onnx(program, part, out, about)
    if half:
        shrink.halve_weights(out)
    if images:
        print(f'{quantise(out, images)} linear layers in int8')
    operators = programs.count_operators(out)
    print(f'opset {programs.OPSET}, {sum(n for _, n in operators)} nodes: '
          + ', '.join(f'{n} {name}' for name, n in operators))


def find_calibration(folder: Path, about: Dict[str, str]) -> List[Path]:
    """Some images of a folder, for a file that infer_onnx.py can prepare them for.

    Raises:
        FileNotFoundError, ValueError: If there are none, or it cannot.
    """
    from infer_onnx import RESULTS, STEPS, unknown_steps

    from mmlavit.analysis.images import find_images
    task = json.loads(about['task'])
    unknown = unknown_steps(json.loads(about['resize']))
    if task not in RESULTS:
        raise ValueError(f'--int8: exported would be the {task}: expected one of '
                         f'{", ".join(RESULTS)}; for a detector: --part end-to-end')
    if unknown:
        raise ValueError(f'--int8: test pipeline: {", ".join(unknown)}: expected '
                         f'{", ".join(STEPS)} alone, with a scale')
    return find_images(folder, MOST_IMAGES)


def quantise(path: Path, images: List[Path]) -> int:
    """Calibrates a file with images, prepared as its metadata says."""
    from infer_onnx import Model

    from mmlavit.analysis.images import read_image
    from mmlavit.export.shrink import quantise_linear
    model = Model(path)
    return quantise_linear(
        path, (model.prepare(read_image(file, None))[0] for file in images))


def verify(part, out: Path, runtime: str, most: float, boxes: float) -> None:
    """Prints a table; exits with 1 where a difference is above ``most``."""
    from mmlavit.analysis.report import markdown_table
    from mmlavit.export.verify import largest_differences
    rows = largest_differences(part, out, runtime, boxes=boxes)
    print(f'\nlargest difference of {runtime} from the model, relative:\n')
    print(markdown_table([
        dict(zip(('batch', 'height', 'width'), row['size']),
             difference=f'{row["difference"]:.1e}', output=row['output'])
        for row in rows
    ]))
    if all(row['output'] == 'dets, 0 boxes' for row in rows):
        sys.exit(f'{out}: no box was found, so none was compared: give a trained '
                 'CHECKPOINT, or a config with model.test_cfg.score_thr=0')
    wrong = [row for row in rows if not row['difference'] <= most]
    if wrong:
        sys.exit('\n'.join(f'{out}: {row["output"]} at {row["size"]}: differs '
                           f'by {row["difference"]:.1e}, expected at most {most}'
                           for row in wrong))


if __name__ == '__main__':
    main()
