"""One item of a data set: its files, its labels, and its way through the pipeline."""
import contextlib
import io
import warnings
from collections import Counter
from typing import List, NamedTuple, Optional, Tuple

import numpy as np
from mmcv.transforms import LoadAnnotations
from mmengine import fileio
from mmengine.dataset import BaseDataset
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

Finding = Tuple[str, str]  # ('ERROR: problem' or 'WARNING: problem', where)


class CheckedItem(NamedTuple):
    """What was found at an item."""
    findings: List[Finding]
    labels: Optional[Counter]  # boxes, images or pixels of each; None: not labelled


class CheckedItems(Dataset):
    """A data set's items as `CheckedItem`, for a loader with worker processes.

    Args:
        dataset (BaseDataset): The data set, fully initialised.
        num_classes (float): Labels must be below.
    """

    def __init__(self, dataset: BaseDataset, num_classes: float) -> None:
        self.dataset = dataset
        self.num_classes = num_classes
        # The pipeline's own, for the labels before anything is cropped.
        self.load_mask = next(
            (t for t in dataset.pipeline.transforms
             if isinstance(t, LoadAnnotations) and t.with_seg), None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> CheckedItem:
        warnings.simplefilter('ignore')
        Image.MAX_IMAGE_PIXELS = None  # a large image is no attack here
        info = self.dataset.get_data_info(i)
        path, failure, dropped = info.get('img_path', f'item {i}'), None, False
        try:
            dropped = self.dataset.pipeline(self.dataset.get_data_info(i)) is None
        except Exception as error:  # whatever a pipeline may raise
            failure = f'{path}: {type(error).__name__}: {error}'
        found: List[Finding] = []
        size = self.read_size('image', info.get('img_path'), failure, found)
        labels = self.count_labels(info, size, path, failure, found)
        self.check_labels(labels, info.get('seg_map_path') or path, found)
        if failure and not found:
            found.append(('ERROR: item at which the pipeline fails', failure))
        if dropped and not found:
            found.append(('WARNING: item that the pipeline drops', path))
        if labels is not None and not labels:
            found.append(('WARNING: image without annotations', path))
        return CheckedItem(found, labels)

    def count_labels(self, info: dict, size: Optional[Tuple[int, int]], path: str,
                     failure: Optional[str],
                     found: List[Finding]) -> Optional[Counter]:
        """Labels of boxes, of the image or of its mask, whichever the item has."""
        if 'instances' in info:
            stated = info.get('width'), info.get('height')
            if size and all(stated) and size != stated:
                found.append(('ERROR: image of another size than its annotations '
                              'say', f'{path}: {size}, not {stated}'))
            return Counter(each['bbox_label'] for each in info['instances']
                           if not each.get('ignore_flag'))
        if 'gt_label' in info:
            return Counter(np.atleast_1d(info['gt_label']).tolist())
        if self.load_mask is None:
            return None
        mask_path = info.get('seg_map_path')
        mask_size = self.read_size('mask', mask_path, failure, found)
        if size and mask_size and size != mask_size:
            found.append(('ERROR: mask of another size than its image',
                          f'{mask_path}: {mask_size}, not {size}'))
        with contextlib.suppress(Exception):  # the pipeline failed as well
            return self.count_pixels(info, found)

    def count_pixels(self, info: dict, found: List[Finding]) -> Counter:
        """Pixels of each label but the ignored, as the pipeline loads them."""
        mask = self.load_mask(info)['gt_seg_map']
        if mask.ndim != 2:
            found.append(('ERROR: mask of colours, not labels',
                          f"{info['seg_map_path']}: shape {mask.shape}"))
        labels, pixels = np.unique(mask, return_counts=True)
        counts = Counter(dict(zip(labels.tolist(), pixels.tolist())))
        del counts[getattr(self.dataset, 'ignore_index', 255)]
        return counts

    def check_labels(self, labels: Optional[Counter], path: str,
                     found: List[Finding]) -> None:
        """Labels are numbers of classes."""
        wrong = [x for x in labels or () if not 0 <= x < self.num_classes]
        if wrong:
            found.append(('ERROR: label that is no class', f'{path}: '
                          f'{wrong}, expected 0 to {self.num_classes - 1}'))

    def read_size(self, what: str, path: Optional[str], failure: Optional[str],
                  found: List[Finding]) -> Optional[Tuple[int, int]]:
        """(width, height) of an image that is read whole; OpenCV takes cut-off
        ones too."""
        if not isinstance(path, str):
            return None
        backend_args = getattr(self.dataset, 'backend_args', None)
        try:
            image = Image.open(
                io.BytesIO(fileio.get(path, backend_args=backend_args)))
            image.load()
            return ImageOps.exif_transpose(image).size  # turned as by mmcv
        except FileNotFoundError:
            found.append((f'ERROR: missing {what}', path))
        except Exception as error:  # OSError, SyntaxError and others
            # What Pillow does not know, another decoder may have read.
            if failure or not isinstance(error, UnidentifiedImageError):
                found.append((f'ERROR: unreadable {what}', f'{path}: {error}'))
        return None
