import pytest
import torch
from torch import nn

from mmlavit.models.layers.block import ConvFFN
from mmlavit.models.layers.tracing import is_compiling, is_exporting

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'),
    reason='torch 2.1 does not compile LaViT (layers/tracing.py)')


class Answers(nn.Module):

    def forward(self, x):
        return x + (1 if is_exporting() else 0) + (2 if is_compiling() else 0)


def test_a_compiler_is_no_exporter():
    """torch's own question says that it is."""
    model, x = Answers(), torch.zeros(1)
    assert model(x) == 0
    assert torch.compile(model, backend='eager', fullgraph=True)(x) == 2
    assert torch.export.export(model, (x, ), strict=False).module()(x) == 3


def test_compiled_the_ffn_keeps_its_dropout():
    """The form for exports, which has none, is for inference."""
    ffn = ConvFFN(dims=8, hidden_dims=16, act_cfg=dict(type='GELU'), drop_rate=0.5)
    compiled = torch.compile(ffn, backend='eager', fullgraph=True)
    x = torch.randn(2, 36, 8)
    assert 0.3 < (compiled(x, (6, 6)) == 0).float().mean() < 0.7
    ffn.eval()
    torch.testing.assert_close(compiled(x, (6, 6)), ffn(x, (6, 6)))
