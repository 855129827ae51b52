"""Exported files against the models they were made of, at sizes never seen."""
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import nn

from builders import digits_config, randomise
from mmlavit import LaViT
from mmlavit.analysis.building import build_model
from mmlavit.models.layers.grid import region_means

if not hasattr(torch.compiler, 'is_exporting'):
    pytest.skip('torch is too old to export', allow_module_level=True)
onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('openvino')

from mmlavit.export import choose, parts, programs, verify  # noqa: E402

ROOT = Path(__file__).parents[2]
# Every kind of layer: VA, LA, and scores inherited across stages.
BACKBONE = dict(
    type='LaViT',
    arch=dict(
        embed_dims=(8, 16),
        depths=(2, 1),
        num_heads=(1, 2),
        num_va_layers=(1, 0)),
    sr_ratios=(8, 4),
    pretrain_img_size=64,
    out_indices=(0, 1))


class Bare(parts.Part):
    """A module as it is."""
    task = 'backbone'
    outputs = ['out']

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images):
        return (self.module(images), )


def as_onnx(part: parts.Part, path: Path) -> Path:
    programs.to_onnx(programs.export_program(part), part, path)
    return path


def run(*command) -> str:
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


ONE_STAGE = dict(  # for time: symbolic ratios take torch long
    arch=dict(embed_dims=(8, ), depths=(2, ), num_heads=(1, ), num_va_layers=(1, )),
    sr_ratios=(8, ),
    out_indices=(0, ),
    max_key_grid=3,
    value_reduction='pool')


@pytest.mark.parametrize('options', [dict(), ONE_STAGE], ids=['auto', 'options'])
def test_backbone_at_sizes_that_are_not_the_examples(options, tmp_path):
    model = nn.Module()
    model.backbone = randomise(
        LaViT(**{k: v for k, v in {**BACKBONE, **options}.items() if k != 'type'}))
    part = choose.choose_part(model, 'backbone')
    program = programs.export_program(part)
    path, half, pt2 = (tmp_path / x for x in ('x.onnx', 'half.onnx', 'x.pt2'))
    programs.to_onnx(program, part, path)
    sizes = [*verify.SIZES, (2, 33, 35), (1, 64, 64)]  # the base grid's too

    def worst(path, runtime='onnxruntime'):
        return max(row['difference'] for row in verify.largest_differences(
            part, path, runtime, sizes))

    assert worst(path) < 1e-5
    half.write_bytes(path.read_bytes())
    programs.halve_weights(half)
    assert 1e-5 < worst(half) < 1e-2
    assert half.stat().st_size < path.stat().st_size
    programs.to_pt2(program, pt2)
    assert worst(pt2, 'torch') < 1e-5
    operators = dict(programs.count_operators(path))
    assert operators['Softmax'] == operators['Gelu'] == sum(part.backbone.arch['depths'])
    if not options:
        # What the weights alone give is computed already; attention is as written.
        assert not {'ReduceL2', 'Unsqueeze', 'Pad'} & set(operators)
    assert worst(path, 'openvino') < 1e-5


def test_area_pooling_in_float64(tmp_path):
    part = Bare(nn.AdaptiveAvgPool2d((5, 3))).double()
    part.example = lambda *size: (torch.rand(size[0], 3, *size[1:]).double(), )
    run_onnx = verify.load(as_onnx(part, tmp_path / 'x.onnx'), 'onnxruntime')
    for size in [(5, 3), (1, 1), (7, 14), (4, 50), (123, 31)]:
        x = torch.rand(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(
            run_onnx(x)[0], F.adaptive_avg_pool2d(x, (5, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize('size', [1, 5, 8, 13])
@pytest.mark.parametrize('ratio', [1, 3, 8, 20])
def test_means_over_regions_as_products(size, ratio):
    x = torch.rand(1, 1, size, 1, dtype=torch.float64)
    expected = F.avg_pool2d(
        x, (ratio, 1), ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(
        region_means(size, ratio, x) @ x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('as_node', [False, True])
def test_frozen_sizes_are_named(as_node):
    """149 and 181 are a grid of the example; 64 might be a number of channels."""
    shape = onnx.numpy_helper.from_array(np.int64([-1, 64, 149 * 181]), 'shape')
    nodes = [onnx.helper.make_node('Reshape', ['x', 'shape'], ['y'], 'to_tokens')]
    if as_node:
        nodes.insert(0, onnx.helper.make_node('Constant', [], ['shape'],
                                              value=shape))
    graph = onnx.helper.make_graph(nodes, 'g', [], [],
                                   [] if as_node else [shape])
    found = list(programs.frozen_sizes(onnx.helper.make_model(graph)))
    assert found == ["Reshape 'to_tokens': 26969"]


def segmentor_config(head: dict, neck=None) -> Config:
    head = dict(in_index=[0, 1], channels=8, num_classes=5, align_corners=False,
                loss_decode=dict(type='CrossEntropyLoss'), **head)
    return Config(dict(
        default_scope='mmseg',
        visualizer=dict(type='SegLocalVisualizer'),
        model=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(
                type='SegDataPreProcessor', mean=[120.] * 3, std=[60.] * 3,
                bgr_to_rgb=True),
            backbone=BACKBONE, decode_head=head, neck=neck,
            test_cfg=dict(mode='whole'))))


UPERNET = dict(type='UPerHead', in_channels=[8, 16], pool_scales=(1, 2, 3))


def test_segmentor_with_stock_head(tmp_path):
    part = choose.choose_part(
        randomise(build_model(segmentor_config(UPERNET))), 'model')
    rows = verify.largest_differences(
        part, as_onnx(part, tmp_path / 'x.onnx'), 'onnxruntime',
        [(1, 97, 161), (3, 64, 40)])
    assert max(row['difference'] for row in rows) < 1e-4


def test_segmentor_by_three_ways(digits, tmp_path):
    """Semantic FPN: verified at other sizes, and the framework's masks on images."""
    config = segmentor_config(
        dict(type='FPNHead', in_channels=[8, 8], feature_strides=[4, 8]),
        dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2))
    images = digits / 'images/val'
    config.test_dataloader = dict(dataset=dict(
        type='BaseSegDataset', data_root=str(images), pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(208, 112), keep_ratio=True),
            dict(type='PackSegInputs')]))
    config.test_pipeline = config.test_dataloader.dataset.pipeline
    paths = save(randomise(build_model(config)), config, tmp_path, tuple('abcde'))
    run('tools/export.py', *paths, tmp_path / 'x.onnx', '--verify')
    run_without_torch('tools/infer_onnx.py', tmp_path / 'x.onnx', images, '--out',
                      tmp_path / 'onnx')
    run('tools/infer.py', *paths, images, '--out', tmp_path / 'stock', '--device',
        'cpu', '--batch-size', 3)
    found, expected = predictions(tmp_path / 'onnx'), predictions(tmp_path / 'stock')
    assert found.keys() == expected.keys() and len(found) == 4
    assert len(set().union(*(x['shares'] for x in expected.values()))) > 2
    for name, stock in expected.items():
        # A pixel or two of 25,600 may lie on the edge between two classes.
        assert found[name]['shares'] == pytest.approx(stock['shares'], abs=1e-4)
        mask = cv2.imread(str(tmp_path / 'onnx/pictures' / name), -1)
        assert mask.shape == (160, 160) and mask.max() < 5
        assert (tmp_path / 'stock/pictures' / name).stat().st_size


def test_wrong_parts_are_named():
    model = build_model(segmentor_config(UPERNET))
    with pytest.raises(ValueError, match="part='end-to-end': EncoderDecoder"):
        choose.choose_part(model, 'end-to-end')
    config = detector_config(Path('data'))
    config.model.bbox_head.loss_cls = dict(type='CrossEntropyLoss')
    with pytest.raises(ValueError, match='loss_cls=.*use_sigmoid=True'):
        choose.choose_part(build_model(config), 'end-to-end')
    config = detector_config(Path('data'))
    config.model.test_cfg.nms.type = 'soft_nms'
    with pytest.raises(ValueError, match="test_cfg.nms=.*expected .*'nms'"):
        choose.choose_part(build_model(config), 'end-to-end')


def test_weights_beyond_float16_are_named(tmp_path):
    part = Bare(nn.Conv2d(3, 400, 1))
    part.module.weight.data[0] = 1e6
    path = as_onnx(part, tmp_path / 'x.onnx')
    with pytest.raises(ValueError, match='module.weight.*1e[+]06'):
        programs.halve_weights(path)


def detector_config(digits: Path) -> Config:
    """The demo's, smaller."""
    config = Config.fromfile(ROOT / 'configs/retinanet_lavit_digits.py')
    for loader in (config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = f'{digits}/'
    config.model.backbone = BACKBONE
    config.model.neck.update(in_channels=[8, 16], out_channels=8, num_outs=2)
    config.model.bbox_head.update(num_ins=2, in_channels=8, feat_channels=8)
    config.model.bbox_head.anchor_generator.strides = [4, 8]
    return config


def save(model: nn.Module, config: Config, folder: Path, classes) -> tuple:
    """A config and a checkpoint as a training leaves them."""
    paths = folder / 'config.py', folder / 'epoch_1.pth'
    config.dump(paths[0])
    meta = dict(classes=classes, palette=[[20 * i] * 3 for i in range(len(classes))])
    torch.save(dict(meta=dict(dataset_meta=meta), state_dict=model.state_dict()),
               paths[1])
    return paths


def predictions(folder: Path) -> dict:
    return json.loads((folder / 'predictions.json').read_text())


def as_dets(result: dict) -> tuple:
    dets = np.column_stack([result['bboxes'], result['scores']])
    labels = torch.tensor([int(label) for label in result['labels']])
    return torch.from_numpy(dets)[None], labels[None]


def run_without_torch(script: str, *argv) -> str:
    code = ("import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    return run('-c', code, script, *argv)


def test_linear_layers_in_int8_are_nearly_the_same(tmp_path):
    """Each product and 1x1 convolution with stored weights, and nothing else."""
    module = nn.Sequential(nn.Conv2d(3, 64, 1), nn.GELU(), nn.Conv2d(64, 8, 3),
                           nn.Flatten(2), nn.LazyLinear(5))
    module(torch.zeros(1, 3, 12, 12))
    part = Bare(module)
    path = tmp_path / 'x.onnx'
    x = torch.rand(4, 3, 12, 12)
    torch.onnx.export(part, (x, ), path, dynamo=True, input_names=['images'],
                      verbose=False)
    assert programs.quantise_linear(
        path, [dict(images=x.numpy()), dict(images=x.flip(0).numpy())]) == 2
    stored = [w.data_type for w in onnx.load(path).graph.initializer
              if len(w.dims) > 1]
    assert sorted(stored) == [onnx.TensorProto.FLOAT] + [onnx.TensorProto.INT8] * 2
    with torch.no_grad():
        expected = module(x)
    for runtime in ('onnxruntime', 'openvino'):
        found, = verify.load(path, runtime)(x)
        assert 1e-5 < verify.relative_difference(expected, found) < .05, runtime


def test_nearest_boxes_by_hand():
    dets = torch.tensor([[[0, 0, 10, 10, .9], [0, 0, 20, 40, .5], [0, 0, 0, 0, 0]]])
    labels = torch.tensor([[1, 2, -1]])
    order = [1, 0, 2]
    assert verify.nearest_boxes(
        dets, labels, dets[:, order], labels[:, order]).eq(0).all()
    others = dets.clone()
    others[0, 1, 3] -= 4  # a tenth of the largest corner
    others[0, 0, 4] -= .2
    found = verify.nearest_boxes(dets, labels, others, labels)
    torch.testing.assert_close(found, torch.tensor([.2, .1, .2, .1]))
    found = verify.nearest_boxes(dets, labels, dets, torch.tensor([[0, 2, -1]]))
    assert found.isinf().sum() == 2
    # One is missing there: it has no match, the others have.
    missing = torch.tensor([[1, -1, -1]])
    found = verify.nearest_boxes(dets, labels, dets, missing)
    assert found.isinf().tolist() == [False, True, False]


@pytest.mark.parametrize('mask', [False, True])
@pytest.mark.parametrize('scale', [1., None])
def test_attention_is_pytorchs(mask, scale, tmp_path):
    """With scale=1, as in LaViT, by our translation, else by torch's own."""
    class Attend(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(
                x, x[:, :, :5], x[:, :, -5:], scale=scale,
                attn_mask=x[..., :5] if mask else None)

    part = Bare(Attend())
    part.example = lambda *size: (torch.randn(size[0], 2, 9, 8), )
    path = tmp_path / 'x.onnx'
    x, = part.example(3)
    program = torch.export.export(
        part, (x, ), dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, ))
    programs.to_onnx(program, part, path)
    x, = part.example(2)
    torch.testing.assert_close(verify.load(path, 'onnxruntime')(x)[0], part(x)[0])
    names = [name for name, _ in programs.count_operators(path)]
    assert (set(names) <= {'Slice', 'Transpose', 'MatMul', 'Add', 'Softmax'}) == (
        scale == 1)


def test_detector_end_to_end_finds_the_frameworks_boxes(digits, tmp_path):
    config = detector_config(digits)
    model = build_model(config)
    model.init_weights()
    randomise(model.backbone)
    # Boxes of several classes, with scores that differ.
    for conv in model.bbox_head.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight)
    nn.init.constant_(model.bbox_head.retina_cls.bias, -3.)
    model.bbox_head.retina_reg.weight.data.mul_(.1)
    paths = save(model, config, tmp_path, tuple('0123456789'))
    path, images = tmp_path / 'detector.onnx', digits / 'images/val'
    report = run('tools/export.py', *paths, path, '--part', 'end-to-end', '--verify')
    assert '1 NonMaxSuppression' in report and '| 3     | 97' in report

    run_without_torch(
        'tools/infer_onnx.py', path, images, '--out', tmp_path / 'onnx')
    report = run('tools/infer.py', *paths, f'{images}/*.png', '--out',
                 tmp_path / 'stock', '--batch-size', '3', '--device', 'cpu')
    assert '4 images' in report
    report = run_without_torch(
        'tools/infer_onnx.py', path, images, '--out', tmp_path / 'openvino',
        '--runtime', 'openvino', '--annotations', digits / 'annotations/val.json')
    assert 'Average Precision  (AP) @[ IoU=0.50:0.95' in report
    found, expected = predictions(tmp_path / 'onnx'), predictions(tmp_path / 'stock')
    assert predictions(tmp_path / 'openvino').keys() == found.keys()
    assert found.keys() == expected.keys() and len(found) == 4
    for name, stock in expected.items():
        assert 5 < len(stock['scores']) and len(set(stock['labels'])) > 1
        assert verify.nearest_boxes(
            *as_dets(found[name]), *as_dets(stock)).max() < 1e-4
        for kind in ('onnx', 'stock'):
            assert (tmp_path / kind / 'pictures' / name).stat().st_size


def test_classifier_by_three_ways(digits, tmp_path):
    images = digits / 'classes/val'
    config = digits_config(digits)
    config.model.backbone = dict(BACKBONE, out_indices=(1, ))
    config.model.head.in_channels = 16
    pipeline = [dict(type='LoadImageFromFile'),
                dict(type='ResizeEdge', scale=48, edge='short', backend='pillow',
                     interpolation='bicubic'),
                dict(type='CenterCrop', crop_size=40), dict(type='PackInputs')]
    config.test_dataloader = dict(dataset=dict(
        type='CustomDataset', data_root=str(images), pipeline=pipeline))
    model = randomise(build_model(config))
    paths = save(model, config, tmp_path, tuple('abcdefghij'))
    file = sorted(images.rglob('*.png'))[3]
    run('tools/export.py', *paths, tmp_path / 'x.onnx')
    run_without_torch(
        'tools/infer_onnx.py', tmp_path / 'x.onnx', file, '--out', tmp_path / 'onnx')
    (tmp_path / 'images').mkdir()
    (tmp_path / f'images/{file.name}').write_bytes(file.read_bytes())
    (tmp_path / 'images/broken.jpg').write_bytes(b'no image')
    report = run('tools/infer.py', *paths, tmp_path / 'images', '--out',
                 tmp_path / 'stock', '--device', 'cpu')
    assert 'images/broken.jpg' in report and '1 files skipped' in report
    ours, stock = (predictions(tmp_path / x)[file.name] for x in ('onnx', 'stock'))
    assert ours['label'] == stock['label'] and ours['label'] in 'abcdefghij'
    assert ours['score'] == pytest.approx(stock['score'], rel=1e-4)
    assert (tmp_path / f'stock/pictures/{file.name}').stat().st_size


@pytest.mark.parametrize('tool', ['export', 'infer', 'infer_onnx'])
def test_help_waits_for_no_torch(tool):
    """It says the default and an example of each option."""
    text = run_without_torch(f'tools/{tool}.py', '--help')
    options = text.split('options:')[1].split('\n  --')[1:]
    assert options and all('default:' in option for option in options)
