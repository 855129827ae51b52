"""Images before models of every toolbox."""
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from builders import ARCH, randomise, small_lavit, stock_pvt
from mmengine.registry import MODELS, init_default_scope
from mmlavit.analysis.building import load_model
from mmlavit.analysis.images import (find_images, make_inputs, measure_similarity,
                                     observe_image, preprocess, read_image)
from mmlavit.analysis.measures import Similarity
from mmlavit.analysis.observe import observe_layers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / 'images' / 'class'
    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3):
        cv2.imwrite(str(path / f'{i}.png'),
                    rng.integers(0, 255, (50, 60, 3), np.uint8))
    return path.parent


@pytest.mark.parametrize('name, head, outs', [
    ('lavit_t_in1k', 'head=dict(in_channels=32)', (3, )),
    ('retinanet_lavit_t_coco', 'neck=dict(in_channels=[16, 24, 32])', (1, 2, 3)),
    ('semantic_fpn_lavit_t_ade20k', 'neck=dict(in_channels=[8, 16, 24, 32])',
     (0, 1, 2, 3)),
])
def test_models_of_every_toolbox_are_loaded_and_measured(
        name, head, outs, folder, tmp_path):
    config = tmp_path / 'small.py'
    config.write_text(
        f"_base_ = {str(ROOT / f'configs/{name}.py')!r}\n"
        "model = dict(backbone=dict(_delete_=True, type='LaViT', "
        f'arch={ARCH}, out_indices={outs}), {head})\n')
    model = load_model(str(config), 'none', 'cpu')
    assert not model.training
    files = find_images(folder, 9)
    initial = measure_similarity(model, files, (64, 96), batch_size=2)
    torch.save(dict(state_dict=randomise(model).state_dict()), tmp_path / 'a.pth')
    # The checkpoint is loaded: its weights' measures, not the initial ones.
    loaded = load_model(str(config), str(tmp_path / 'a.pth'), 'cpu')
    measured = measure_similarity(loaded, files, (64, 96), batch_size=2)
    similarity = Similarity()
    with similarity.observe(model), torch.no_grad():
        model.backbone(make_inputs(model, files, (64, 96)))
    assert measured['images'] == initial['images'] == 3
    for a, b in zip(measured['layers'], similarity.result()['layers']):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    assert measured['layers'][3]['token_similarity'] != pytest.approx(
        initial['layers'][3]['token_similarity'], rel=1e-3)


def test_maps_of_points_and_features_are_those_of_the_layers(folder, tmp_path):
    backbone = small_lavit()

    class Model(torch.nn.Module):
        """What the tools need of a model."""
        def __init__(self):
            super().__init__()
            self.backbone = backbone

        def data_preprocessor(self, data, training):
            return dict(inputs=torch.stack(data['inputs']) / 255)

    model, size, points = Model(), (64, 96), [(.5, .5), (.99, 0.)]
    file = find_images(folder, 1)[0]
    attention, features = observe_image(model, file, points, size)
    layers = []
    with observe_layers(model, layers.append), torch.no_grad():
        backbone(make_inputs(model, [file], size))
    assert [layer.name for layer in attention] == [
        f'backbone.stages.{i}.blocks.{j}' for i, n in enumerate(ARCH['depths'])
        for j in range(n)]
    for maps, layer in zip(attention, layers):
        (height, width), keys = layer.grids.queries, layer.grids.keys
        assert maps.maps.shape == (2, ARCH['num_heads'][layer.stage], *keys)
        assert np.allclose(maps.maps.sum((2, 3)), 1, atol=1e-5)
        whole = layer.attention_of(range(height * width))[0].numpy()
        for i, (x, y) in enumerate(points):
            at = int(y * height) * width + int(x * width)
            assert np.allclose(maps.maps[i].reshape(len(whole), -1), whole[:, at])
    assert [f.shape for f in features] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    last = layers[-1].tokens[0].pow(2).sum(1).sqrt().view(2, 3)
    assert np.allclose(features[-1], last.numpy())


def test_weights_that_do_not_fit_are_named(tmp_path):
    config = str(ROOT / 'configs/lavit_t_in1k.py')
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='x.pth: none of its weights'):
        load_model(config, str(tmp_path / 'x.pth'), 'cpu')
    torch.save({f'backbone.{name}': value for name, value in
                small_lavit().state_dict().items()}, tmp_path / 'y.pth')
    with pytest.raises(ValueError, match='y.pth: LaViT: these are not'):
        load_model(config, str(tmp_path / 'y.pth'), 'cpu')
    with pytest.raises(FileNotFoundError, match='z.pth'):
        load_model(config, str(tmp_path / 'z.pth'), 'cpu')


@pytest.mark.parametrize('scope, kind, options', [
    ('mmseg', 'SegDataPreProcessor', dict(size=(64, 64), test_cfg=dict(size_divisor=32))),
    ('mmseg', 'SegDataPreProcessor', dict(size=(64, 64))),
    ('mmdet', 'DetDataPreprocessor', dict(pad_size_divisor=32)),
    ('mmpretrain', 'ClsDataPreprocessor', dict()),
], ids=lambda value: str(value)[:30])
def test_images_are_normalised_and_padded_as_in_a_test(scope, kind, options):
    init_default_scope(scope)
    channels = dict(to_rgb=True) if scope == 'mmpretrain' else dict(bgr_to_rgb=True)
    model = torch.nn.Module()
    model.data_preprocessor = MODELS.build(dict(
        type=kind, mean=[1., 2., 3.], std=[4., 5., 6.], **channels, **options))
    image = np.random.default_rng(0).integers(0, 255, (50, 64, 3), np.uint8)
    inputs = preprocess(model, [image, image[::-1].copy()])
    assert inputs.shape == (2, 3, 64 if len(options) > 1 or scope == 'mmdet' else 50, 64)
    expected = (image[..., ::-1] - np.array([1., 2., 3.])) / np.array([4., 5., 6.])
    np.testing.assert_allclose(inputs[0, :, :50].permute(1, 2, 0), expected, rtol=1e-5)
    assert not inputs[:, :, 50:].any()


def test_weights_under_other_names_are_loaded(tmp_path):
    """mmdet's, which LaViT converts, with DDP's prefix."""
    stock = stock_pvt(dict(embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2),
                           num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4)))
    torch.save({f'module.backbone.{name}': x.float()
                for name, x in stock.state_dict().items()}, tmp_path / 'b0.pth')
    config = str(ROOT / 'configs/retinanet_lavit_pvtv2-b0_coco.py')
    backbone = load_model(config, str(tmp_path / 'b0.pth'), 'cpu').backbone
    torch.testing.assert_close(
        backbone.stages[0].blocks[0].attn.q.bias.double(),
        stock.layers[0][1][0].attn.attn.in_proj_bias[:32])


def test_images_are_spread_over_the_folder_and_missing_ones_named(tmp_path):
    for i in range(10):
        (tmp_path / f'{i}.png').touch()
    names = [path.stem for path in find_images(tmp_path, 6)]
    assert names == ['0', '1', '3', '5', '6', '8']
    assert len(find_images(tmp_path, 64)) == 10
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='empty: no images there'):
        find_images(tmp_path / 'empty', 6)
    with pytest.raises(ValueError, match='0.png: not a readable image'):
        read_image(tmp_path / '0.png', (8, 8))
