"""Exports a trained model as an ONNX file, or as a .pt2 program of torch.export.

    python tools/export.py CONFIG CHECKPOINT model.onnx --verify
    python tools/export.py CONFIG CHECKPOINT model.pt2
    python tools/export.py CONFIG CHECKPOINT \
        detector.onnx --part end-to-end --verify

Takes any batch size, height and width (sides of at least 33 pixels). ONNX files are of
standard operators alone, opset 20, and hold class names and preprocessing in their
metadata; tools/infer_onnx.py runs them. Without a checkpoint: initial weights.
"""
import argparse
import logging
import sys
from pathlib import Path

# Of the largest value; and the share of a detector's boxes that is compared.
TOLERANCES = dict(float32=(1e-4, 1.), half=(1e-2, .98))


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
        f'({TOLERANCES["half"][0]} with --half); default: not; e.g. --verify')
    parser.add_argument(
        '--runtime', choices=('onnxruntime', 'openvino'), default='onnxruntime',
        help='what --verify runs an ONNX file with; default: onnxruntime; '
        'e.g. --runtime openvino')
    parser.add_argument(
        '--int8', type=Path, metavar='IMAGES',
        help='linear layers in int8, calibrated with some images of this folder; '
        'default: float32; e.g. --int8 data/digits/images/train')
    args = parser.parse_args()
    for path in (args.config, args.checkpoint):
        if path is not None and not path.is_file():
            parser.error(f'{path}: no such file')
    if args.out.suffix not in ('.onnx', '.pt2'):
        parser.error(f'{args.out}: expected a name that ends in .onnx or .pt2')
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
    from mmengine.config import Config

    import mmlavit  # noqa: F401  (registers LaViT)
    from mmlavit.analysis.building import build_model
    from mmlavit.export import choose, metadata, programs
    logging.disable(logging.INFO)  # each parameter's initialisation
    config = Config.fromfile(args.config)
    model = build_model(config)
    try:
        checkpoint = metadata.load_weights(model, args.checkpoint)
        part = choose.choose_part(model, args.part)
        print(f'exporting {args.part} of {args.config}: {part.task}', flush=True)
        program = programs.export_program(part)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.out.suffix == '.pt2':
            programs.to_pt2(program, args.out)
        else:
            names = metadata.class_names(config, checkpoint)
            programs.to_onnx(program, part, args.out,
                             metadata.describe(part, model, config, names))
            if args.half:
                programs.halve_weights(args.out)
            if args.int8:
                count = quantise(args.out, args.int8)
                print(f'{count} linear layers in int8')
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(str(error))
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB')
    if args.out.suffix == '.onnx':
        operators = programs.count_operators(args.out)
        print(f'opset {programs.OPSET}, {sum(n for _, n in operators)} nodes: '
              + ', '.join(f'{n} {name}' for name, n in operators))
    if args.verify:
        verify(part, args)


def quantise(path: Path, images: Path, most: int = 64) -> int:
    """Calibrates a file with images, prepared as its metadata says."""
    from infer_onnx import Model

    from mmlavit.analysis.images import find_images, read_image
    from mmlavit.export.programs import quantise_linear
    model, files = Model(path), find_images(images, most)
    return quantise_linear(
        path, (model.prepare(read_image(file, None))[0] for file in files))


def verify(part, args: argparse.Namespace) -> None:
    """Prints a table; exits with 1 where a difference is too large."""
    from mmlavit.analysis.report import markdown_table
    from mmlavit.export.verify import largest_differences
    runtime = 'torch' if args.out.suffix == '.pt2' else args.runtime
    most, boxes = TOLERANCES['half' if args.half else 'float32']
    rows = largest_differences(part, args.out, runtime, boxes=boxes)
    print(f'\nlargest difference of {runtime} from the model, relative:\n')
    print(markdown_table([
        dict(zip(('batch', 'height', 'width'), row['size']),
             difference=f'{row["difference"]:.1e}', output=row['output'])
        for row in rows
    ]))
    wrong = [row for row in rows if not row['difference'] <= most]
    if wrong:
        sys.exit('\n'.join(f'{args.out}: {row["output"]} at {row["size"]}: differs '
                           f'by {row["difference"]:.1e}, expected at most {most}'
                           for row in wrong))


if __name__ == '__main__':
    main()
