"""Class activation maps of a classifier, segmentor or detector on images.

    python tools/cam.py CONFIG CHECKPOINT IMAGES --out work_dirs/cam
    python tools/cam.py configs/retinanet_lavit_n_digits.py work_dirs/demo/epoch_6.pth \\
        data/digits/images/val/00000.png --category 3 --map 1

HiResCAM on one of the backbone's maps, for any backbone that returns maps: where in the
image the score of a class comes from. Detectors must be of a single stage; their score is
the sum over all anchors above score_thr. Writes one picture for each image to --out.
"""
import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'config', type=Path, help='e.g. configs/retinanet_lavit_digits.py')
    parser.add_argument(
        'checkpoint', type=Path, help='e.g. work_dirs/demo/epoch_6.pth')
    parser.add_argument(
        'images', type=Path,
        help='file, or folder that is searched through; e.g. data/digits/images/val')
    parser.add_argument(
        '--category', type=int, metavar='N',
        help="number of the class, from 0; default: each image's best class; "
        'e.g. --category 3')
    parser.add_argument(
        '--map', type=int, default=-1, metavar='N',
        help="which of the backbone's maps (out_indices); finer ones show small "
        'objects; default: %(default)s, the last; e.g. --map 1')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'),
        help="height and width in pixels that images are resized to; default: each "
        "image's own; e.g. --size 224 224")
    parser.add_argument(
        '--max-images', type=int, default=20, metavar='N',
        help='of a folder, spread evenly; default: %(default)s; e.g. --max-images 100')
    parser.add_argument(
        '--device',
        help='default: the GPU if there is one, else the CPU; e.g. --device cpu')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/cam'), metavar='DIR',
        help='folder that is written to; default: %(default)s; e.g. --out outputs')
    args = parser.parse_args()
    for path in (args.config, args.checkpoint):
        if not path.is_file():
            parser.error(f'{path}: no such file')
    return args


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    import mmcv
    import torch

    import mmlavit  # noqa: F401  (registers LaViT)
    from mmlavit.analysis.building import (build_model, class_names, load_weights,
                                           read_config)
    from mmlavit.analysis.cam import draw_cam
    from mmlavit.analysis.images import (UnreadableImage, find_images, picture_name,
                                         root_of)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        config = read_config(args.config)
        model = build_model(config)
        names = class_names(config, load_weights(model, args.checkpoint))
        model.eval().to(device)
        files, drawn = find_images(args.images, args.max_images), 0
        root = root_of(args.images, files)
        for file in files:
            try:
                picture, label, score = draw_cam(
                    model, file, args.category, args.map, args.size)
            except UnreadableImage as error:
                print(f'{error}, skipped', file=sys.stderr)
                continue
            target = args.out / picture_name(file.relative_to(root))
            mmcv.imwrite(picture, str(target))
            drawn += 1
            print(f'{target}: {names[label] if names else label}, score {score:.3g}')
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(str(error))
    if not drawn:
        sys.exit('no image could be read')


if __name__ == '__main__':
    main()
