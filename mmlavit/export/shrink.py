"""Smaller ONNX files: weights in float16, linear layers in int8."""
from pathlib import Path
from typing import Dict, Iterable, Optional


def halve_weights(path: Path) -> None:
    """Stores the large tensors of an ONNX file in float16, in half the space.

    They are cast where they are used: runtimes compute in float32 still.

    Raises:
        ValueError: If a weight is too large for float16.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    model = onnx.load(path)
    casts = []
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if weight.data_type != TensorProto.FLOAT or values.size < 1000:
            continue  # small ones, as anchors, would lose and not save
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise ValueError(f'export: half: {weight.name}: values up to '
                             f'{np.abs(values).max():.3g} are too large for float16')
        name, stored = weight.name, f'{weight.name}_half'
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
        casts.append(helper.make_node('Cast', [stored], [name], f'{name}_cast',
                                      to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def quantise_linear(path: Path, inputs: Iterable[Dict[str, object]]) -> int:
    """Turns the linear layers of an ONNX file to int8, by onnxruntime's own tool.

    Weights have a scale for each output channel, activations one for each tensor,
    from their largest value on the inputs given. Everything else stays in float32:
    other convolutions, attention, Theta and Psi, norms.

    Weights use 7 of the 8 bits, from -64 to 64. With all 8, x86 processors without VNNI
    overflow: they add the products of two pairs of 8-bit numbers in 16 bits.

    Args:
        path (Path): The file, which is overwritten.
        inputs (Iterable[dict[str, np.ndarray]]): Inputs by name to calibrate with.

    Returns:
        int: How many layers there are.
    """
    import onnx
    from onnxruntime.quantization import (CalibrationDataReader, QuantType,
                                          quantize_static)

    class Reader(CalibrationDataReader):
        rest = iter(inputs)

        def get_next(self) -> Optional[dict]:
            return next(self.rest, None)

    model = onnx.load(path)
    layers = list(linear_layers(model))
    if not layers:
        return 0  # to onnxruntime an empty list means all
    metadata = {x.key: x.value for x in model.metadata_props}
    quantize_static(
        path, path, Reader(), nodes_to_quantize=layers, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        reduce_range=True,
        extra_options=dict(ActivationSymmetric=True, WeightSymmetric=True))
    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return len(layers)


def linear_layers(model) -> Iterable[str]:
    """Names of the products with stored matrices, and of the 1x1 convolutions."""
    shapes = {x.name: x.dims for x in model.graph.initializer}
    for node in model.graph.node:
        weight = shapes.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None:
            continue
        if (node.op_type in ('MatMul', 'Gemm') and len(weight) == 2 or
                node.op_type == 'Conv' and list(weight[2:]) == [1, 1]):
            yield node.name
