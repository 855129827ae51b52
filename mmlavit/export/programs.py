"""Parts of models to programs (torch.export), and programs to ONNX."""
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Set, Tuple

import torch
from torch.export import Dim, ExportedProgram

from .parts import Part

OPSET = 20  # the first with Gelu
# None of its grids' sides or areas is a usual number of channels, so that one that
# stands in a graph is a frozen size. Tensors of this size are never computed.
EXAMPLE = (3, 1367, 1607)
STRIDES = (1, 4, 8, 16, 32, 64, 128)
# Sides below it are axes of one element somewhere, which a graph treats otherwise.
LEAST_SIDE = 33
MAX_FOLDED = 2**28  # the size of a tensor; torch's own limit is small


def export_program(part: Part) -> ExportedProgram:
    """The part for any batch size, height and width.

    Raises:
        RuntimeError: If torch cannot, or not for every size; the message is torch's
            and names the operator or the size.
    """
    if not hasattr(torch.compiler, 'is_exporting'):
        raise RuntimeError(f'export: torch {torch.__version__}: expected one that has '
                           'torch.compiler.is_exporting; 2.11 is what was tried')
    images, *others = part.example(*EXAMPLE)
    any_size = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    if part.divisor > 1:
        any_size.update((axis, part.divisor * Dim(name, min=2))
                        for axis, name in ((2, 'rows'), (3, 'columns')))
    shapes = (any_size, *({0: Dim.AUTO} for _ in others))
    with torch.no_grad():
        return torch.export.export(
            part, (images, *others), dynamic_shapes=shapes, strict=False)


def to_onnx(program: ExportedProgram, part: Part, path: Path,
            metadata: Optional[Dict[str, str]] = None) -> None:
    """Writes a program as an ONNX file of standard operators.

    Args:
        program (ExportedProgram): Of `export_program`, not used before: torch
            refuses to convert one with NMS once it has run.
        part (Part): What it was made of, whose names the file has.
        path (Path): The file to write.
        metadata (dict[str, str], optional): What to write into the file.

    Raises:
        RuntimeError: If a size is frozen; the message names the node and the size.
    """
    import onnx
    from onnxscript import optimizer

    from .translations import TRANSLATIONS
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's, of its own internals
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            verbose=False)
    # What follows from the weights alone, as Theta and Psi, is computed here.
    optimizer.fold_constants(
        made.model, input_size_limit=MAX_FOLDED, output_size_limit=MAX_FOLDED)
    optimizer.remove_unused_nodes(made.model)
    model = made.model_proto
    name_sizes(model)
    frozen = list(frozen_sizes(model, part.fitting(*EXAMPLE[1:]), part.numbers()))
    if frozen:
        raise RuntimeError('export: these nodes hold a size of the example: '
                           + '; '.join(frozen[:5]))
    onnx.helper.set_model_props(model, metadata or {})
    onnx.save(model, path)


def to_fixed_onnx(part: Part, size: Tuple[int, int, int], path: Path) -> None:
    """Writes an ONNX file for one batch size, height and width.

    For models of others, beside which ours are measured: few of them export for any
    size.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's, of its own internals
        torch.onnx.export(
            part, part.example(*size), path, dynamo=True, opset_version=OPSET,
            input_names=list(part.inputs), output_names=list(part.outputs),
            verbose=False, external_data=False)


def name_sizes(model) -> None:
    """Names the sizes of the inputs, and of the outputs what follows from them."""
    names = {}
    axes = model.graph.input[0].type.tensor_type.shape.dim
    for axis, name in zip(axes, ('batch', None, 'height', 'width')):
        if name:
            names[axis.dim_param] = name
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:  # a formula such as 's10 // 4'
                axis.dim_param = re.sub(
                    r'\w+', lambda word: names.get(word[0], word[0]), axis.dim_param)
    del model.graph.value_info[:]


def frozen_sizes(model, sides: Sequence[int] = EXAMPLE[1:],
                 known: Set[int] = frozenset()) -> Iterable[str]:
    """Nodes of the graph that take a size of the example as a constant.

    A frozen batch is not seen, for 3 may be any number.

    Args:
        model (onnx.ModelProto): The graph.
        sides (Sequence[int]): The example's height and width.
        known (Set[int]): Numbers of the model's own, as of its classes.
    """
    import onnx
    from onnx.numpy_helper import to_array
    tensor = onnx.AttributeProto.TENSOR
    grids = [[-(-side // stride) for side in sides] for stride in STRIDES]
    sizes = {n for h, w in grids for n in (h, w, h * w)}
    sizes = {n for n in sizes if n > LEAST_SIDE} - known
    constants = {x.name: to_array(x) for x in model.graph.initializer
                 if x.data_type == x.INT64}
    for node in model.graph.node:
        if node.op_type == 'Constant' and node.attribute[0].type == tensor:
            constants[node.output[0]] = to_array(node.attribute[0].t)
    for node in model.graph.node:
        for name in node.input:
            values = constants[name].ravel().tolist() if name in constants else ()
            for size in sizes.intersection(values):
                yield f'{node.op_type} {node.name!r}: {size}'


def to_pt2(program: ExportedProgram, path: Path,
           metadata: Optional[Dict[str, str]] = None) -> None:
    """Writes a program as a file for ``torch.export.load``.

    Args:
        program (ExportedProgram): Of `export_program`.
        path (Path): The file to write.
        metadata (dict[str, str], optional): Written into it as extra files.
    """
    example, program.example_inputs = program.example_inputs, None  # 80 MB
    try:
        torch.export.save(program, path, extra_files=metadata)
    finally:
        program.example_inputs = example


def count_operators(path: Path) -> List[Tuple[str, int]]:
    """The operators of an ONNX file, most frequent first.

    Raises:
        ValueError: If one is not of the ONNX standard.
    """
    import onnx
    model = onnx.load(path, load_external_data=False)
    others = {f'{node.domain}.{node.op_type}' for node in model.graph.node
              if node.domain}
    if others or model.functions:
        raise ValueError(f'{path}: operators that are not ONNX\'s own: '
                         f'{", ".join(sorted(others)) or "functions"}')
    return Counter(node.op_type for node in model.graph.node).most_common()
