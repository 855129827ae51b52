"""Less attention stays alive at ten times the learning rate."""
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from mmlavit import LaViT
from mmlavit.analysis.measures import entropy
from mmlavit.analysis.observe import observe_layers

ARCH = dict(
    embed_dims=(8, 16, 32), depths=(1, 1, 6), num_heads=(1, 2, 4),
    num_va_layers=(1, 1, 1), mlp_ratios=(2, 2, 2), strides=(2, 2, 1),
    patch_sizes=(3, 3, 3))


def digits() -> tuple:
    """Real scanned digits, (n, 3, 16, 16), and their classes."""
    data = load_digits()
    images = torch.tensor(data.images / 8 - 1).float()[:, None]
    return F.interpolate(images, scale_factor=2).expand(
        -1, 3, -1, -1), torch.tensor(data.target)


def train(model: nn.Module, lr: float, steps: int) -> None:
    torch.manual_seed(0)
    images, classes = digits()
    head = nn.Linear(32, 10)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *head.parameters()], lr, foreach=True)
    for _ in range(steps):
        chosen = torch.randint(len(images), (32, ))
        out = head(model(images[chosen])[0].mean((2, 3)))
        optimizer.zero_grad()
        F.cross_entropy(out, classes[chosen]).backward()
        optimizer.step()


@pytest.mark.parametrize('options, steps', [
    ({}, 200),
    (dict(mixing='low_rank'), 200),
    (dict(pretrain_img_size=8), 200),  # the images' grid is larger than the base grid
], ids=['full', 'low-rank', 'larger-grid'])
def test_no_layer_dies_at_ten_times_the_learning_rate(options, steps):
    """Unbounded mixing, ``I + W``, ends here at entropies below 0.01."""
    torch.manual_seed(0)
    model = LaViT(
        arch=ARCH, sr_ratios=(2, 1, 1), out_indices=(2, ),
        **{'pretrain_img_size': 16, **options})
    model.init_weights()
    train(model, lr=1e-2, steps=steps)
    layers = []
    with observe_layers(model, layers.append), torch.no_grad():
        model.eval()(digits()[0][:32])
    kinds = [layer.kind for layer in layers]
    assert kinds == ['VA'] * 3 + ['LA'] * 5
    alive = [entropy(layer.region_map()).item() for layer in layers]
    deviations = [layer.region_scores().std(-1).mean().item() for layer in layers]
    source = alive[2]
    for value in alive[3:]:
        assert value > .05 or source < .05, alive
        assert value < .98 or source > .98, alive
    for before, after in zip(deviations[2:], deviations[3:]):
        assert .5 < after / before < 2, deviations
