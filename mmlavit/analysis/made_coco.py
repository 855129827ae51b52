"""Images with boxes in COCO's format, for trials of configs without COCO."""
import json
from pathlib import Path
from typing import Tuple

import cv2
import numpy as np


def make_coco(folder: Path, count: int, size: Tuple[int, int], boxes: int = 7) -> None:
    """Noise with filled rectangles, each a class by its colour.

    Args:
        folder (Path): Gets ``images/`` and ``train.json``.
        count (int): Images.
        size (tuple[int, int]): (width, height) of them in pixels.
        boxes (int): Of each image. Default: 7, about as many as COCO's have.
    """
    from mmdet.datasets import CocoDataset
    classes = CocoDataset.METAINFO['classes']
    width, height = size
    rng = np.random.default_rng(0)
    (folder / 'images').mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        image = rng.integers(0, 255, (height, width, 3), np.uint8)
        for _ in range(boxes):
            w, h = (int(n * rng.uniform(.1, .5)) + 1 for n in size)
            x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
            label = int(rng.integers(len(classes)))
            image[y:y + h, x:x + w] = (3 * label, 255 - 3 * label, 80)
            annotations.append(dict(
                id=len(annotations) + 1, image_id=i, category_id=label,
                bbox=[x, y, w, h], area=w * h, iscrowd=0))
        cv2.imwrite(str(folder / f'images/{i}.jpg'), image)
        images.append(dict(id=i, file_name=f'{i}.jpg', width=width, height=height))
    (folder / 'train.json').write_text(json.dumps(dict(
        images=images, annotations=annotations,
        categories=[dict(id=i, name=name) for i, name in enumerate(classes)])))
