"""Parts of the way from programs to ONNX."""
import pytest

from mmlavit.export.programs import name_sizes

onnx = pytest.importorskip('onnx')


def test_sizes_are_named_although_one_symbol_begins_another():
    """torch numbers its symbols, so that s1 and s10 may stand in one formula."""
    def tensor(name, shape):
        return onnx.helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, shape)

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node('Identity', ['image'], ['map'])], 'a graph',
        [tensor('image', ['s1', 3, 's10', 's100'])],
        [tensor('map', ['s1', 8, '(s10 - 1)//4 + 1', 's100*s10'])])
    model = onnx.helper.make_model(graph)
    name_sizes(model)

    def sizes(value):
        return [axis.dim_param or axis.dim_value
                for axis in value.type.tensor_type.shape.dim]

    assert sizes(model.graph.input[0]) == ['batch', 3, 'height', 'width']
    assert sizes(model.graph.output[0]) == [
        'batch', 8, '(height - 1)//4 + 1', 'width*height']
