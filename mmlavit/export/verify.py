"""Exported files against the model they were made of."""
import functools
import math
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from .parts import Part

# Batch, height, width: odd and oblong ones, below and above the usual.
SIZES = ((1, 224, 224), (3, 97, 161), (1, 320, 200), (2, 65, 130))
RUNTIMES = ('onnxruntime', 'openvino', 'torch')


@functools.lru_cache(maxsize=None)
def openvino_core():
    """OpenVINO's, one for the process.

    Each has its own stack for signal handlers. When two go in the order in which they
    came, OpenVINO 2026.4 leaves freed memory as that stack, and the next signal that
    Python handles ends the process without a word, such as that of a data loader's
    worker that ends.
    """
    import openvino
    return openvino.Core()


def load(path: Path, runtime: str) -> Callable[..., List[Tensor]]:
    """A file as a function of tensors, on the CPU.

    Args:
        path (Path): An ``.onnx`` file, or a ``.pt2`` file for 'torch'.
        runtime (str): 'onnxruntime', 'openvino' or 'torch'.
    """
    if runtime == 'torch':
        program = torch.export.load(path).module()
        return lambda *inputs: list(program(*inputs))
    if runtime == 'onnxruntime':
        import onnxruntime
        session = onnxruntime.InferenceSession(
            path, providers=['CPUExecutionProvider'])
        names = [x.name for x in session.get_inputs()]
        return lambda *inputs: [
            torch.from_numpy(x) for x in session.run(
                None, {n: x.numpy() for n, x in zip(names, inputs)})
        ]
    # Its default on processors with AMX is bfloat16.
    model = openvino_core().compile_model(path, 'CPU',
                                          {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda *inputs: [
        torch.from_numpy(x.copy())
        for x in model([x.numpy() for x in inputs]).to_tuple()
    ]


@torch.no_grad()
def largest_differences(
    part: Part, path: Path, runtime: str,
    sizes: Sequence[Tuple[int, int, int]] = SIZES,
    boxes: float = 1.
) -> List[Dict[str, object]]:
    """Largest difference of any output, relative to its largest value, by size.

    Args:
        part (Part): What the file was made of.
        path (Path): The file.
        runtime (str): What runs it; see `load`.
        sizes (Sequence[tuple[int, int, int]]): Batch, height and width in pixels; the
            next that fit the part.
        boxes (float): The share of a detector's boxes that is compared, the nearest.
            With rounded weights NMS keeps another of two boxes of almost the same
            score here and there, and the other one has no match. Defaults to 1.
    """
    run = load(path, runtime)
    rows = []
    for size in sizes:
        inputs = part.example(*size)
        expected, got = part(*inputs), run(*inputs)
        if part.task == 'detection':
            distances = nearest_boxes(*expected, *got).sort().values
            compared = distances[:math.ceil(boxes * len(distances))]
            # Without boxes, as of an untrained model, nothing is compared.
            count = (expected[1] >= 0).sum().item()
            differences = [(largest(compared), f'dets, {count} boxes')]
        else:
            differences = [
                (relative_difference(*pair), name)
                for *pair, name in zip(expected, got, part.outputs, strict=True)]
        worst, output = max(differences)
        rows.append(dict(size=(size[0], *inputs[0].shape[2:]), difference=worst,
                         output=output))
    return rows


def nearest_boxes(dets: Tensor, labels: Tensor, other_dets: Tensor,
                  other_labels: Tensor) -> Tensor:
    """How far each box of two results is from the nearest in the other.

    Boxes whose scores are the same to the last digits may stand in any order.

    Args:
        dets (Tensor): (B, n, 5), corners in pixels and score.
        labels (Tensor): (B, n), -1 where there is no box; a box of another label is
            no match.
        other_dets, other_labels (Tensor): As these.

    Returns:
        Tensor: For every box of either result the largest difference of a corner,
        over the largest corner, or of the score.
    """
    if dets.shape != other_dets.shape:
        return torch.tensor([math.inf])
    scale = dets.new_ones(5)
    scale[:4] = dets[..., :4].abs().max().clamp(min=1)
    distance = torch.cdist(dets / scale, other_dets / scale, p=math.inf)
    distance = distance.masked_fill(
        labels[:, :, None] != other_labels[:, None], math.inf)
    return torch.cat([distance.amin(2)[labels >= 0],
                      distance.amin(1)[other_labels >= 0]])


def relative_difference(expected: Tensor, got: Tensor) -> float:
    """Infinite if the shapes differ, or where there is no number (NaN)."""
    if expected.shape != got.shape:
        return math.inf
    scale = expected.double().abs().max().clamp(min=1e-12)
    return largest((expected.double() - got.double()).abs() / scale)


def largest(values: Tensor) -> float:
    """The largest value: infinite if one is NaN, 0 if there are none."""
    if not values.numel():
        return 0.
    value = values.max().item()  # NaN if there is one
    return math.inf if math.isnan(value) else value
