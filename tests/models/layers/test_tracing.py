import pytest
import torch
from torch import nn

from mmlavit.models.layers import attend
from mmlavit.models.layers.block import ConvFFN
from mmlavit.models.layers.tracing import is_compiling, is_exporting

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'),
    reason='torch is too old: it has no torch.compiler.is_exporting')


class Answers(nn.Module):

    def forward(self, x):
        return x + (1 if is_exporting() else 0) + (2 if is_compiling() else 0)


def test_a_compiler_is_no_exporter():
    """torch's own question says that it is."""
    model, x = Answers(), torch.zeros(1)
    assert model(x) == 0
    assert torch.compile(model, backend='eager', fullgraph=True)(x) == 2
    assert torch.export.export(model, (x, ), strict=False).module()(x) == 3


def make_ffn():
    return ConvFFN(dims=8, hidden_dims=16, act_cfg=dict(type='GELU'), drop_rate=0.5)


def functions(model, *args):
    """The names of the functions that a compiler is given."""
    names = []

    def listen(graph_module, inputs):
        names.extend(node.target.__name__ for node in graph_module.graph.nodes
                     if node.op == 'call_function')
        return graph_module.forward

    torch.compile(model, backend=listen, fullgraph=True)(*args)
    return names


def test_compiled_the_ffn_keeps_its_dropout():
    """Convolutions, which leave it out, are for inference."""
    ffn, x = make_ffn(), torch.randn(2, 36, 8)
    compiled = torch.compile(ffn, backend='eager', fullgraph=True)
    assert 0.3 < (compiled(x, (6, 6)) == 0).float().mean() < 0.7
    ffn.eval()
    torch.testing.assert_close(compiled(x, (6, 6)), ffn(x, (6, 6)))


def test_compiled_the_ffn_is_of_convolutions_in_inference_on_a_cpu():
    ffn, x = make_ffn(), torch.randn(2, 36, 8)
    names = functions(ffn, x, (6, 6))
    assert (names.count('linear'), names.count('conv2d')) == (2, 1)
    names = functions(ffn.eval(), x, (6, 6))
    assert (names.count('linear'), names.count('conv2d')) == (0, 3)


def test_a_compiler_is_given_no_pieces(monkeypatch):
    """Nor the whole matrix, where that is more than may be built at once."""
    monkeypatch.setitem(attend.MAX_BUILT_SCORES, 'cpu', 20)

    def pieces(x):
        starts = attend.piece_starts(100, 10, x.device)
        return x + (-1 if starts is None else len(starts))

    x = torch.zeros(1)
    assert pieces(x) == 50
    assert torch.compile(pieces, backend='eager', fullgraph=True)(x) == -1
