"""The toolboxes' inferencers, alike for all three: files in, pictures and JSON out."""
import json
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from torch import nn
from tqdm import tqdm

from ..utils.weights import load_fitting
from .building import quiet, read_config
from .images import (UnreadableImage, find_images, picture_name, read_image,
                     root_of)


def infer(config: Path, checkpoint: Path, images: str, out: Path,
          device: Optional[str] = None, batch_size: int = 1,
          score_thr: float = 0.3) -> Tuple[int, List[str]]:
    """Predicts for files and writes pictures and ``predictions.json``.

    Args:
        config (Path): Config of one of the toolboxes.
        checkpoint (Path): The weights.
        images (str): A file, a folder, which is searched through, or a pattern.
        out (Path): Folder to write to. Pictures have the names that the files have
            below ``images``, with ``.png`` behind where it is not there.
        device (str, optional): Default: the GPU if there is one, else the CPU.
        batch_size (int): Files at once. Defaults to 1.
        score_thr (float): Least score of a box that is drawn. Defaults to 0.3.

    Returns:
        tuple[int, list[str]]: How many files there are predictions for, and those
        that could not be read.

    Raises:
        FileNotFoundError: If there are no images.
        ValueError: If the config is of no toolbox, or the checkpoint lacks weights of
            the model.
    """
    files = find_images(images)
    root = root_of(images, files)
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    predictions, skipped = {}, []
    with quiet(), tqdm(total=len(files), unit='image', disable=None) as bar:
        predict = build(read_config(config), checkpoint, device, score_thr)
        for batch in readable_batches(files, batch_size, skipped):
            for file, (result, picture) in zip(batch, predict(batch)):
                name = file.relative_to(root)
                predictions[name.as_posix()] = result
                mmcv.imwrite(picture[..., ::-1],
                             str(out / 'pictures' / picture_name(name)))
            bar.update(len(batch))
        bar.update(len(skipped))
    out.mkdir(parents=True, exist_ok=True)
    (out / 'predictions.json').write_text(json.dumps(predictions, indent=1))
    return len(predictions), skipped


def readable_batches(files: List[Path], batch_size: int,
                     skipped: List[str]) -> Iterator[List[Path]]:
    """Files that can be read; the others' names go to ``skipped``.

    An inferencer stops at the first that cannot, with all before it lost.
    """
    batch = []
    for file in files:
        try:
            read_image(file)
        except UnreadableImage:
            skipped.append(str(file))
            continue
        batch.append(file)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def build(config: Config, checkpoint: Path, device: str,
          score_thr: float) -> Callable:
    """A function from files to (prediction, RGB picture) of each."""
    toolbox = config.get('default_scope')
    builders: Dict[str, Callable] = dict(
        mmdet=detection, mmseg=segmentation, mmpretrain=classification)
    if toolbox not in builders:
        raise ValueError(f'default_scope={toolbox!r}: expected one of '
                         f'{", ".join(builders)}')
    return builders[toolbox](config, str(checkpoint), device, score_thr)


def check_weights(model: nn.Module, checkpoint: str) -> None:
    """That the checkpoint has all of the model, which inferencers only log.

    Raises:
        ValueError: If it does not.
    """
    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    found = load_fitting(model, loaded.get('state_dict', loaded))
    if found.missing or found.sizes:
        raise ValueError(f'{checkpoint}: expected all weights of the model: '
                         f'{found._replace(unexpected=[]).describe()}')


def detection(config, checkpoint, device, score_thr) -> Callable:
    from mmdet.apis import DetInferencer
    inferencer = DetInferencer(
        config, checkpoint, device=device, show_progress=False)
    check_weights(inferencer.model, checkpoint)
    names = inferencer.model.dataset_meta['classes']

    def predict(files: List[Path]) -> Iterator[tuple]:
        result = inferencer([str(file) for file in files], len(files),
                            return_vis=True, pred_score_thr=score_thr)
        for found, picture in zip(result['predictions'], result['visualization']):
            found['labels'] = [names[label] for label in found['labels']]
            yield found, picture

    return predict


def segmentation(config, checkpoint, device, score_thr) -> Callable:
    from mmseg.apis import MMSegInferencer
    inferencer = MMSegInferencer(config, checkpoint, device=device)
    inferencer.show_progress = False
    check_weights(inferencer.model, checkpoint)
    names = inferencer.model.dataset_meta['classes']

    def predict(files: List[Path]) -> Iterator[tuple]:
        for file in files:  # a batch must be of one size
            result = inferencer([str(file)], return_vis=True)
            mask = result['predictions']
            labels, counts = np.unique(mask, return_counts=True)
            yield dict(shares={names[label]: count / mask.size for label, count in zip(
                labels, counts.tolist())}), result['visualization']

    return predict


def classification(config, checkpoint, device, score_thr) -> Callable:
    from mmpretrain import ImageClassificationInferencer
    from mmpretrain.visualization import UniversalVisualizer
    inferencer = ImageClassificationInferencer(config, checkpoint, device=device)
    check_weights(inferencer.model, checkpoint)
    visualizer = UniversalVisualizer()

    def predict(files: List[Path]) -> Iterator[tuple]:
        names = [str(file) for file in files]
        batches = inferencer.preprocess(names, batch_size=len(files))
        samples = [x for batch in batches for x in inferencer.forward(batch)]
        results = inferencer.postprocess(samples, [])
        for name, sample, result in zip(names, samples, results):
            picture = visualizer.visualize_cls(
                mmcv.imread(name)[..., ::-1], sample, classes=inferencer.classes,
                draw_gt=False)
            yield dict(label=result.get('pred_class', str(result['pred_label'])),
                       score=result['pred_score']), picture

    return predict
