"""Runs a file of tools/export.py on images with onnxruntime or OpenVINO, without torch.

    python tools/infer_onnx.py detector.onnx IMAGES --out outputs
    python tools/infer_onnx.py classifier.onnx photo.jpg --runtime openvino
    python tools/infer_onnx.py detector.onnx IMAGES --annotations val.json

Detectors (exported with ``--part end-to-end``), classifiers and segmentors.
Needs the runtime, numpy and OpenCV; Pillow where the file says so. Preprocessing and
class names come from the file. Writes to --out: ``predictions.json``, and for each
image a picture with boxes, or a mask whose pixels are class indices.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Tuple

SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff'}
# Steps of a test pipeline that `resize` knows.
STEPS = ('Resize', 'ResizeEdge', 'CenterCrop')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'model', type=Path, help='of tools/export.py; e.g. detector.onnx')
    parser.add_argument(
        'images', type=Path,
        help='file, or folder that is searched through; e.g. data/digits/images/val')
    parser.add_argument(
        '--out', type=Path, default=Path('outputs'),
        help='folder to write to; default: outputs; e.g. --out work_dirs/onnx')
    parser.add_argument(
        '--score-thr', type=float, default=0.3,
        help='least score of a box that is drawn; predictions.json has all; '
        'default: 0.3; e.g. --score-thr 0.5')
    parser.add_argument(
        '--runtime', choices=('onnxruntime', 'openvino'), default='onnxruntime',
        help='default: %(default)s; e.g. --runtime openvino')
    parser.add_argument(
        '--annotations', type=Path, metavar='JSON',
        help="COCO's; prints the average precision of a detector, by pycocotools; "
        'default: off; e.g. --annotations data/digits/annotations/val.json')
    args = parser.parse_args()
    for path in (args.model, args.images, args.annotations):
        if path is not None and not path.exists():
            parser.error(f'{path}: no such file or folder')
    return args


class Model:
    """An exported model with its own preprocessing.

    Args:
        path (Path): The file.
        runtime (str): 'onnxruntime' or 'openvino'. Default: 'onnxruntime'.

    Raises:
        ValueError: If it is no file that can be run here.
    """

    def __init__(self, path: Path, runtime: str = 'onnxruntime') -> None:
        start = start_openvino if runtime == 'openvino' else start_onnxruntime
        try:
            self.run, held = start(path)
        except ImportError:
            raise
        except Exception as error:  # whatever a runtime may raise
            raise ValueError(f'{path}: no model that {runtime} can run: {error}') from None
        if 'task' not in held:
            raise ValueError(
                f'{path}: no metadata: expected a file of tools/export.py')
        self.about = {name: json.loads(value) for name, value in held.items()}
        if self.task not in RESULTS:
            raise ValueError(
                f'{path}: exported is the {self.task}: expected one of '
                f'{", ".join(RESULTS)}; see --part of tools/export.py')
        unknown = unknown_steps(self.about['resize'])
        if unknown:
            raise ValueError(
                f'{path}: test pipeline: {", ".join(unknown)}: expected '
                f'{", ".join(STEPS)} alone, with a scale')

    @property
    def task(self) -> str:
        return self.about['task']

    def name(self, label: int) -> str:
        """The class of a label."""
        names = self.about['classes']
        return names[label] if names else str(label)

    def __call__(self, image) -> Tuple[list, Tuple[int, int]]:
        """The outputs for one image (H, W, 3), BGR, 0 to 255; and its new size."""
        inputs, size = self.prepare(image)
        return self.run(inputs), size

    def prepare(self, image) -> Tuple[dict, Tuple[int, int]]:
        """The inputs for one image, by name; and its new size."""
        import numpy as np
        image = resize(image, self.about['resize'])
        height, width = image.shape[:2]
        if self.about['channels'] == 'rgb':
            image = image[..., ::-1]
        mean, std = (np.float32(self.about[name]) for name in ('mean', 'std'))
        image = (image.astype(np.float32) - mean) / std
        bottom, right = (-side % self.about['pad_divisor']
                         for side in (height, width))
        image = np.pad(image, ((0, bottom), (0, right), (0, 0)))
        inputs = dict(images=image.transpose(2, 0, 1)[None].copy())
        if self.task == 'detection':
            inputs['shapes'] = np.float32([[height, width]])
        return inputs, (height, width)


def start_onnxruntime(path: Path) -> tuple:
    """A file as a function from inputs by name to outputs; and its metadata."""
    import onnxruntime
    # TensorRT would build an engine for minutes, for every size.
    providers = [name for name in ('CUDAExecutionProvider', 'CPUExecutionProvider')
                 if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(path, providers=providers)
    return (lambda inputs: session.run(None, inputs),
            session.get_modelmeta().custom_metadata_map)


def start_openvino(path: Path) -> tuple:
    """The same; in bfloat16 where the processor has it, unlike onnxruntime."""
    import openvino
    core = openvino.Core()
    model = core.read_model(path)
    rt_info = model.get_rt_info()
    held = rt_info['framework'] if 'framework' in rt_info else {}
    compiled = core.compile_model(model, 'CPU')
    return (lambda inputs: list(compiled(inputs).to_tuple()),
            {name: held[name].astype(str) for name in held})


def unknown_steps(steps: List[dict]) -> List[str]:
    """Those of a test pipeline that `resize` would not do as the framework."""
    return [step['type'] for step in steps if step['type'] not in STEPS
            or step['type'] != 'CenterCrop' and not step.get('scale')]


def resize(image, steps: List[dict]):
    """The steps of a test pipeline that change an image's size."""
    for step in steps:
        height, width = image.shape[:2]
        if step['type'] == 'CenterCrop':
            crop = as_pair(step['crop_size'])
            top, left = (max(0, round((side - c) / 2))
                         for side, c in zip((height, width), crop[::-1]))
            image = image[top:top + crop[1], left:left + crop[0]]
        elif step['type'] == 'ResizeEdge':
            edge, scale = step.get('edge', 'short'), step['scale']
            if edge == 'width' or (edge != 'height' and
                                   (edge == 'short') == (width < height)):
                size = scale, int(scale * height / width)
            else:
                size = int(scale * width / height), scale
            image = scaled(image, size, step)
        else:
            size = as_pair(step['scale'])
            if step.get('keep_ratio'):
                scale = min(max(size) / max(height, width),
                            min(size) / min(height, width))
                size = int(width * scale + .5), int(height * scale + .5)
            image = scaled(image, size, step)
    return image


def as_pair(size) -> Tuple[int, int]:
    """(width, height)"""
    return (size, size) if isinstance(size, int) else tuple(size)


def scaled(image, size: Tuple[int, int], step: dict):
    """An image of (width, height), by the library that the step names."""
    how = step.get('interpolation', 'bilinear')
    if step.get('backend') == 'pillow':
        import numpy as np
        from PIL import Image
        return np.array(Image.fromarray(image).resize(
            size, getattr(Image.Resampling, how.upper())))
    import cv2
    flags = dict(nearest=cv2.INTER_NEAREST, bilinear=cv2.INTER_LINEAR,
                 bicubic=cv2.INTER_CUBIC, area=cv2.INTER_AREA,
                 lanczos=cv2.INTER_LANCZOS4)
    return cv2.resize(image, size, interpolation=flags[how])


def detection(model: Model, image, outputs: list,
              size: tuple) -> Tuple[dict, Optional[object]]:
    """Boxes in pixels of the image."""
    import numpy as np
    dets, labels = (x[0] for x in outputs)
    found = labels >= 0
    scale = np.float32([image.shape[1] / size[1], image.shape[0] / size[0]] * 2)
    return dict(bboxes=(dets[found, :4] * scale).tolist(),
                scores=dets[found, 4].tolist(),
                labels=[model.name(label) for label in labels[found]]), None


def draw_boxes(image, result: dict, score_thr: float):
    """The image with the boxes of at least that score."""
    import cv2
    picture, color = image.copy(), (0, 200, 0)
    for box, score, label in zip(*(result[x] for x in ('bboxes', 'scores', 'labels'))):
        if score >= score_thr:
            x1, y1, x2, y2 = map(round, box)
            cv2.rectangle(picture, (x1, y1), (x2, y2), color)
            cv2.putText(picture, f'{label} {score:.2f}', (x1, y1 + 11),
                        cv2.FONT_HERSHEY_SIMPLEX, .4, color)
    return picture


def classification(model: Model, image, outputs: list,
                   size: tuple) -> Tuple[dict, Optional[object]]:
    """The most likely class."""
    import numpy as np
    logits = outputs[0][0].astype(np.float64)
    scores = np.exp(logits - logits.max())
    best = int(scores.argmax())
    return dict(label=model.name(best),
                score=float(scores[best] / scores.sum())), None


def segmentation(model: Model, image, outputs: list,
                 size: tuple) -> Tuple[dict, Optional[object]]:
    """Each class's share of the pixels, and the mask of class indices."""
    import cv2
    import numpy as np
    logits = outputs[0][0][:, :size[0], :size[1]].transpose(1, 2, 0)
    # Logits are resized, not classes, as mmsegmentation does; 4 at a time is
    # what OpenCV takes.
    full = [cv2.resize(np.ascontiguousarray(logits[..., i:i + 4]),
                       image.shape[1::-1]).reshape(*image.shape[:2], -1)
            for i in range(0, logits.shape[-1], 4)]
    kind = np.uint8 if logits.shape[-1] <= 256 else np.uint16
    mask = np.concatenate(full, -1).argmax(-1).astype(kind)
    labels, counts = np.unique(mask, return_counts=True)
    return dict(shares={model.name(label): count / mask.size
                        for label, count in zip(labels.tolist(), counts)}), mask


RESULTS = dict(detection=detection, classification=classification,
               segmentation=segmentation)


def average_precision(predictions: Dict[str, dict], annotations: Path) -> None:
    """Prints COCO's figures of boxes; images are found by the ends of their names."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    truth = COCO(str(annotations))
    ids = {Path(image['file_name']).name: key for key, image in truth.imgs.items()}
    if len(ids) < len(truth.imgs):
        sys.exit(f'--annotations {annotations}: images in different folders have the '
                 'same name: expected names that differ')
    categories = {x['name']: key for key, x in truth.cats.items()}
    unknown = [file for file in predictions if Path(file).name not in ids]
    if unknown:
        sys.exit(f'--annotations {annotations}: {len(unknown)} of the images are not '
                 f'in it, the first {unknown[0]}')
    if len({Path(file).name for file in predictions}) < len(predictions):
        sys.exit('--annotations: IMAGES in different folders have the same name: expected '
                 f'the folder of the images of {annotations} alone')
    rows = []
    for file, found in predictions.items():
        for (x1, y1, x2, y2), score, label in zip(
                found['bboxes'], found['scores'], found['labels']):
            if label not in categories:
                sys.exit(f'--annotations {annotations}: no class {label!r}: expected '
                         f"the model's; it has {', '.join(categories)}")
            rows.append(dict(
                image_id=ids[Path(file).name], category_id=categories[label],
                bbox=[x1, y1, x2 - x1, y2 - y1], score=score))
    if not rows:
        sys.exit('--annotations: the model found no box, so the average precision is 0')
    evaluation = COCOeval(truth, truth.loadRes(rows), 'bbox')
    evaluation.params.imgIds = [ids[Path(file).name] for file in predictions]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()


def find_images(path: Path) -> Iterable[Path]:
    files = [path] if path.is_file() else sorted(
        file for file in path.rglob('*') if file.suffix.lower() in SUFFIXES)
    if not files:
        sys.exit(f'{path}: no images there ({", ".join(sorted(SUFFIXES))})')
    return files


def picture_name(file: Path) -> Path:
    """As of tools/infer.py: a.jpg.png for a.jpg, which a.png does not overwrite."""
    return file if file.suffix == '.png' else file.with_name(f'{file.name}.png')


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    import cv2
    try:
        model = Model(args.model, args.runtime)
    except ValueError as error:
        sys.exit(str(error))
    if args.annotations and model.task != 'detection':
        sys.exit(f'--annotations: {args.model}: expected a detector, end to end')
    root = args.images if args.images.is_dir() else args.images.parent
    predictions: Dict[str, dict] = {}
    for file in find_images(args.images):
        image = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if image is None:
            print(f'{file}: not a readable image, skipped', file=sys.stderr)
            continue
        name = file.relative_to(root)
        outputs, size = model(image)
        result, picture = RESULTS[model.task](model, image, outputs, size)
        if model.task == 'detection':
            picture = draw_boxes(image, result, args.score_thr)
        predictions[name.as_posix()] = result
        if picture is not None:
            target = args.out / 'pictures' / picture_name(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(target), picture)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'predictions.json').write_text(json.dumps(predictions, indent=1))
    print(f'{len(predictions)} images; written to {args.out}')
    if not predictions:
        sys.exit('no image could be read')
    if args.annotations:
        average_precision(predictions, args.annotations)


if __name__ == '__main__':
    main()
