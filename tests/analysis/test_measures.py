"""How alike layers are."""
import numpy as np
import pytest
import torch

from builders import randomise, small_lavit
from mmlavit.analysis.measures import (MEASURES, Similarity, asymmetry,
                                       diagonal_largest, entropy,
                                       head_similarity, map_similarity,
                                       mean_pairwise_cosine, score_deviation,
                                       similarity_rows)


def test_measures_of_hand_computed_examples():
    a = torch.tensor([[[[.6, .4], [.8, .2]]]])
    b = torch.tensor([[[[.8, .2], [.6, .4]]]])
    # columns (.6, .8), (.8, .6): .96; (.4, .2), (.2, .4): .16 / .2 = .8
    assert map_similarity(a, b).item() == pytest.approx((.96 + .8) / 2)
    assert map_similarity(a, a).item() == pytest.approx(1)
    unseen = torch.tensor([[[[1., 0.], [1., 0.]]]])
    assert map_similarity(unseen, unseen).item() == pytest.approx(1)
    both = torch.cat([a, b], 1)
    assert head_similarity(both).item() == pytest.approx((.96 + .8) / 2)
    assert head_similarity(a).isnan()
    # with another number of heads: of the means over heads
    assert map_similarity(both, both.mean(1, keepdim=True)).item() == (
        pytest.approx(1))
    assert asymmetry(a).item() == pytest.approx(.4)
    # Of four keys: one key alone, two alike, all alike: 0, log 2 / log 4, 1.
    rows = torch.tensor([[1., 0, 0, 0], [.5, 0, .5, 0], [.25] * 4])
    assert entropy(rows[None, None]).item() == pytest.approx(.5)
    assert entropy(torch.ones(1, 2, 3, 1)).isnan()
    # Re-Attention's norm makes maps of any sign.
    assert entropy(torch.tensor([[[[1.5, -.5], [.5, .5]]]])).isnan()
    assert score_deviation(torch.tensor([[[[1., 3.], [7., 7.]]]])) == .5
    assert diagonal_largest(a).item() == .5
    tokens = torch.tensor([[1., 0.], [0., 2.], [3., 3.]])
    assert mean_pairwise_cosine(tokens).item() == pytest.approx(
        (0 + .5**.5 + .5**.5) / 3)


def test_similarity_is_averaged_over_images_and_sees_collapse():
    model = randomise(small_lavit(transform='identity'), std=1.)
    x = torch.rand(3, 3, 64, 64)
    whole, parts = Similarity(), Similarity()
    with whole.observe(model), torch.no_grad():
        model(x)
    for part in (x[:2], x[2:]):
        with parts.observe(model), torch.no_grad():
            model(part)
    a, b = whole.result(), parts.result()
    assert a['images'] == b['images'] == 3
    for u, v in zip(a['layers'], b['layers']):
        assert u == pytest.approx(v, rel=1e-4, nan_ok=True)
    for i, layer in enumerate(a['layers']):
        collapsed = layer['map_similarity_to_previous']
        if layer['kind'] == 'LA' and a['layers'][i - 1]['stage'] == (
                layer['stage']):
            assert collapsed == pytest.approx(1, abs=1e-5)
    assert min(layer['map_similarity_to_previous'] for layer in a['layers']
               if layer['map_similarity_to_previous'] is not None) < .99
    matrix = np.array(a['map_similarity'], dtype=float)
    assert np.allclose(matrix, matrix.T) and np.allclose(np.diag(matrix), 1)


def test_rows_have_every_layer_of_every_model():
    layer = dict(dict.fromkeys(MEASURES, .5), layer=0, name='x', stage=1, kind='VA')
    result = dict(images=1, layers=[layer, dict(layer, layer=1)], map_similarity=[])
    rows = similarity_rows(dict(a=result, b=result))
    assert [(row['model'], row['layer']) for row in rows] == [
        ('a', 0), ('a', 1), ('b', 0), ('b', 1)]
    assert rows[0] == dict(layer, model='a')
