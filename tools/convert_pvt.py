"""PVTv2's weights as the start of a LaViT.

    python tools/convert_pvt.py pvt_v2_b2.pth lavit_pvtv2-b2.pth --arch pvtv2_b2

It knows the names of PVTv2's authors, of mmdetection, timm and mmpretrain. With a
preset of PVTv2's layout, vanilla attention loses nothing. A less-attention layer
takes values, output projection and FFN; its Q and K are dropped, and Theta and Psi
begin at the identity, so that it repeats its predecessor's attention. Prints which.
LaViT loads such weights by itself too, wherever a checkpoint is named.

--fit IMAGES fits Theta and Psi to the attention of the layers whose Q and K are
dropped, on up to 256 images of a folder, without labels; it prints the divergence of
the maps before and after, on the fifth of the images that it does not fit to.

With --arch nano, tiny, small or base, whose last stage is narrower, it takes what fits.
Layers that differ in number are spread evenly, tensors that differ in size are
cropped, or keep their initial values where PVTv2's is smaller.

Detection and segmentation configs take the result with

    --cfg-options model.backbone.init_cfg.checkpoint=lavit_pvtv2-b2.pth

and retinanet_lavit_pvtv2-*.py, whose own weights have no prefix, also with
model.backbone.init_cfg.prefix=backbone. Classification configs, which begin from
nothing, take it with

    --cfg-options load_from=lavit_s_from_pvt.pth
"""
import argparse
import sys
from pathlib import Path


# As in mmlavit.models.backbones.arch, which takes seconds to import.
ARCHS = ('nano', 'tiny', 'small', 'base', *(f'pvtv2_b{i}' for i in range(6)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'pvt', type=Path, help='official weights; e.g. pvt_v2_b2.pth')
    parser.add_argument(
        'out', type=Path, help='file to be written; e.g. lavit_pvtv2-b2.pth')
    parser.add_argument(
        '--arch', default='small', choices=ARCHS,
        help="LaViT's; default: %(default)s; e.g. --arch pvtv2_b2")
    parser.add_argument(
        '--num-va-layers', type=int, nargs='+', metavar='N',
        help="VA layers of each stage; default: the preset's; "
        'e.g. --num-va-layers 3 4 6 3')
    parser.add_argument(
        '--fit', type=Path, metavar='IMAGES',
        help="folder to fit Theta and Psi on, for PVTv2's layout; default: no fit; "
        'e.g. --fit images')
    args = parser.parse_args()
    if args.fit and not args.arch.startswith('pvtv2'):
        parser.error(f'--fit with --arch {args.arch}: expected a preset of PVTv2\'s '
                     'layout, whose maps can be compared')
    return args


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    from mmengine.logging import MMLogger
    from mmlavit.checkpoints.from_pvt import convert_file
    MMLogger.get_current_instance().setLevel('WARNING')
    try:
        found, total = convert_file(args.pvt, args.out, args.arch,
                                    args.num_va_layers, args.fit)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    print(f'{args.out}: {len(found.weights)} of {total} tensors; names as those of '
          f'{found.naming}')
    state = 'fitted' if found.fitted else 'at the identity'
    for title, names in ((f'Q and K dropped, Theta and Psi {state}', found.dropped),
                         ('initial values kept', found.missing),
                         ('not used, or only in part', found.unused)):
        print(f'{title} ({len(names)}):', *sorted(names), sep='\n  ')
    for layer in found.fitted:
        print(f'{layer.name}: KL divergence of its attention {layer.before:.3g} before, '
              f'{layer.after:.3g} after fitting')


if __name__ == '__main__':
    main()
