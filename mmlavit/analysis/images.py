"""Image files before a model: found, prepared, and what it makes of them."""
import glob
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import mmcv
import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from tqdm import tqdm

from .measures import Similarity
from .observe import Layer, observe_layers

SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff'}


class UnreadableImage(ValueError):
    """A file that no image can be read from."""


def find_images(images: Union[str, Path], limit: Optional[int] = None) -> List[Path]:
    """The files that a path or a pattern stands for, in order of their names.

    Args:
        images (str | Path): A file; a folder, which is searched through; or a pattern.
        limit (int, optional): Of more files, so many are taken, spread evenly. Default:
            all.

    Raises:
        FileNotFoundError: If there are none.
    """
    path = Path(images)
    if path.is_dir():
        files = [x for x in path.rglob('*') if x.suffix.lower() in SUFFIXES]
    elif path.is_file():
        files = [path]
    else:
        files = [Path(x) for x in glob.glob(str(images), recursive=True)
                 if Path(x).is_file()]
    if not files:
        raise FileNotFoundError(
            f'{images}: no images there: expected a file, a folder or a pattern '
            f'of files ({", ".join(sorted(SUFFIXES))})')
    files = sorted(files)
    count = len(files) if limit is None else min(limit, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def root_of(images: Union[str, Path], files: Sequence[Path]) -> Path:
    """The folder below which `find_images` found files: the innermost of a pattern."""
    if Path(images).is_dir():
        return Path(images)
    return next(folder for folder in files[0].parents
                if all(folder in file.parents for file in files))


def read_image(file: Path, size: Optional[Tuple[int, int]] = None) -> np.ndarray:
    """An image file as BGR bytes (H, W, 3), resized to (H, W) if that is given.

    Raises:
        UnreadableImage: If it cannot be read.
    """
    try:
        image = mmcv.imread(file)
    except Exception:  # whatever a decoder may raise
        image = None
    if image is None:
        raise UnreadableImage(f'{file}: not a readable image')
    return image if size is None else mmcv.imresize(image, size[::-1])


def picture_name(file: Path) -> Path:
    """The name of a PNG picture for a file, such as a.jpg.png for a.jpg.

    So pictures for a.jpg and a.png of one folder keep apart.
    """
    return file if file.suffix == '.png' else file.with_name(f'{file.name}.png')


def make_inputs(model: nn.Module, files: Sequence[Path],
                size: Tuple[int, int]) -> Tensor:
    """Files as the model's own preprocessor leaves them: (B, 3, H, W)."""
    return preprocess(model, [read_image(file, size) for file in files])


def preprocess(model: nn.Module, images: Sequence[np.ndarray]) -> Tensor:
    """BGR bytes (H, W, 3) as the model's own preprocessor leaves them in a test.

    Args:
        model (nn.Module): Of any of the three toolboxes.
        images (Sequence[np.ndarray]): Of one size.

    Returns:
        Tensor: (B, 3, H, W), padded at the bottom and right where the model asks for
        it.
    """
    inputs = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]
    samples = [BaseDataElement() for _ in images]  # mmsegmentation's pads their masks
    return model.data_preprocessor(
        dict(inputs=inputs, data_samples=samples), training=False)['inputs']


@torch.no_grad()
def measure_similarity(model: nn.Module, files: Sequence[Path],
                       size: Tuple[int, int], batch_size: int) -> dict:
    """All measures of `Similarity`, averaged over the images.

    Args:
        model (nn.Module): In eval mode, with a backbone that can be observed.
        files (Sequence[Path]): The images.
        size (tuple[int, int]): (H, W) they are resized to.
        batch_size (int): Images at a time.
    """
    similarity = Similarity()
    for i in tqdm(range(0, len(files), batch_size), 'images', disable=None):
        inputs = make_inputs(model, files[i:i + batch_size], size)
        with similarity.observe(model):
            model.backbone(inputs)
    return similarity.result()


class LayerMaps(NamedTuple):
    """Where chosen points look in one layer."""
    name: str
    kind: str  # 'VA' or 'LA'
    maps: np.ndarray  # (points, heads, h, w)


class ImageMaps(NamedTuple):
    """What a model makes of one image."""
    attention: List[LayerMaps]
    features: List[np.ndarray]  # a stage's last tokens' magnitude (h, w)


@torch.no_grad()
def observe_image(model: nn.Module, file: Path,
                  points: Sequence[Tuple[float, float]],
                  size: Tuple[int, int]) -> ImageMaps:
    """Attention maps of points of an image, and the stages' feature maps.

    Layers that attend within windows have no map of the image, and are left out.

    Args:
        model (nn.Module): In eval mode, with a backbone that can be observed.
        file (Path): The image.
        points (Sequence[tuple[float, float]]): (x, y) as shares of width and
            height, below 1.
        size (tuple[int, int]): (H, W) the image is resized to.
    """
    attention: List[LayerMaps] = []
    features: Dict[int, np.ndarray] = {}  # of the stages

    def callback(layer: Layer) -> None:
        magnitude = layer.tokens[0].float().norm(dim=1)
        features[layer.stage] = magnitude.view(
            layer.token_grid or layer.grids.queries).cpu().numpy()
        if layer.token_grid is not None:
            return  # windows: no map of the whole image
        height, width = layer.grids.queries
        queries = [int(y * height) * width + int(x * width) for x, y in points]
        # (heads, points, M) -> (points, heads, h, w)
        maps = layer.attention_of(queries)[0].transpose(0, 1).unflatten(
            2, layer.grids.keys)
        attention.append(
            LayerMaps(layer.name, layer.kind, maps.float().cpu().numpy()))

    with observe_layers(model, callback):
        model.backbone(make_inputs(model, [file], size))
    return ImageMaps(attention, list(features.values()))
