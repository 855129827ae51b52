"""Exported files against the models they were made of, at sizes never seen."""
import contextlib
import ctypes
import importlib
import io
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from builders import digits_config, load_tool, randomise
from mmlavit import LaViT
from mmlavit.analysis.building import build_model
from mmlavit.models.layers.grid import region_means

if not hasattr(torch.compiler, 'is_exporting'):
    pytest.skip('torch is too old to export', allow_module_level=True)
onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('openvino')

from mmlavit.export import (choose, metadata, parts, programs,  # noqa: E402
                            shrink, verify)

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


TOOLS = {name: load_tool(name) for name in ('infer_onnx', 'export', 'infer')}


def run(tool: str, *argv) -> str:
    """What a tool says, run in this process, which has imported the toolboxes."""
    out = io.StringIO()
    with mock.patch.object(sys, 'argv', [tool, *map(str, argv)]), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        TOOLS[tool].main()
    assert logging.root.manager.disable == 0  # else others' logs would be lost
    return out.getvalue()


@pytest.fixture
def traced_once(monkeypatch) -> None:
    """torch.export runs once for all files that a test makes of one kind of part."""
    made, export_program = {}, programs.export_program

    def export(part: parts.Part):
        if type(part) not in made:
            made[type(part)] = export_program(part)
        return made[type(part)]

    monkeypatch.setattr(programs, 'export_program', export)


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
    path = tmp_path / 'x.onnx'
    programs.to_onnx(program, part, path)
    sizes = [*verify.SIZES, (2, 33, 35), (1, 64, 64)]  # the base grid's too

    def worst(path, runtime='onnxruntime'):
        return max(row['difference'] for row in verify.largest_differences(
            part, path, runtime, sizes))

    assert worst(path) < 1e-5
    assert worst(path, 'openvino') < 1e-5
    operators = dict(programs.count_operators(path))
    assert operators['Softmax'] == operators['Gelu'] == sum(part.backbone.arch['depths'])
    if options:
        return  # for time: the rest does not depend on them
    # What the weights alone give is computed already; attention is as written.
    assert not {'ReduceL2', 'Unsqueeze', 'Pad'} & set(operators)
    half, pt2 = tmp_path / 'half.onnx', tmp_path / 'x.pt2'
    half.write_bytes(path.read_bytes())
    shrink.halve_weights(half)
    assert 1e-5 < worst(half) < 1e-2
    assert half.stat().st_size < path.stat().st_size
    programs.to_pt2(program, pt2)
    assert worst(pt2, 'torch') < 1e-5
    assert pt2.stat().st_size < 2e6  # so without the example, of 80 MB


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
@pytest.mark.parametrize('grid', [(171, 201), (11, 13)], ids=['stride 8', 'stride 128'])
def test_frozen_sizes_are_named(as_node, grid):
    """A grid of the example; 64 might be a number of channels."""
    frozen = grid[0] * grid[1]
    shape = onnx.numpy_helper.from_array(np.int64([-1, 64, frozen]), 'shape')
    nodes = [onnx.helper.make_node('Reshape', ['x', 'shape'], ['y'], 'to_tokens')]
    if as_node:
        nodes.insert(0, onnx.helper.make_node('Constant', [], ['shape'],
                                              value=shape))
    graph = onnx.helper.make_graph(nodes, 'g', [], [],
                                   [] if as_node else [shape])
    model = onnx.helper.make_model(graph)
    assert list(programs.frozen_sizes(model)) == [f"Reshape 'to_tokens': {frozen}"]
    assert not list(programs.frozen_sizes(model, known={frozen}))


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


UPERNET = dict(type='UPerHead', in_channels=[8, 16], pool_scales=(1, 3))


@pytest.mark.parametrize('name', ['UPerNet', 'RetinaNet'])
def test_logits_and_dense_detections_in_every_runtime(name, tmp_path):
    config = (segmentor_config(UPERNET) if name == 'UPerNet' else
              detector_config(Path('data')))
    part = choose.choose_part(randomise(build_model(config)), 'model')
    assert part.outputs == dict(UPerNet=['logits'], RetinaNet=[
        'cls_score0', 'cls_score1', 'bbox_pred0', 'bbox_pred1'])[name]
    path, pt2 = tmp_path / 'x.onnx', tmp_path / 'x.pt2'
    program = programs.export_program(part)
    programs.to_onnx(program, part, path)
    programs.to_pt2(program, pt2, dict(classes='["a"]'))
    held = dict(classes='')
    torch.export.load(pt2, extra_files=held)
    assert held == dict(classes='["a"]')
    for file, runtime in ((path, 'onnxruntime'), (path, 'openvino'), (pt2, 'torch')):
        rows = verify.largest_differences(
            part, file, runtime, [(1, 97, 161), (3, 64, 40)])
        assert max(row['difference'] for row in rows) < 1e-4, runtime


def test_segmentor_by_three_ways(digits, tmp_path, traced_once):
    """Semantic FPN: verified at other sizes, and the framework's masks on images."""
    config = segmentor_config(
        dict(type='FPNHead', in_channels=[8, 8], feature_strides=[4, 8]),
        dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2))
    images = shutil.copytree(digits / 'images/val', tmp_path / 'images')
    odd = cv2.imread(str(images / '00000.png'))[:100]
    cv2.imwrite(str(images / 'odd.png'), odd)  # of another size than the rest
    config.test_dataloader = dict(dataset=dict(
        type='BaseSegDataset', data_root=str(images), pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(208, 112), keep_ratio=True),
            dict(type='PackSegInputs')]))
    config.test_pipeline = config.test_dataloader.dataset.pipeline
    paths = save(randomise(build_model(config)), config, tmp_path, tuple('abcde'))
    run('export', *paths, tmp_path / 'x.onnx', '--verify')
    report = run('export', *paths, tmp_path / 'half.onnx', '--half', '--verify')
    assert '| 3     | 97' in report and ' Cast' in report
    half, whole = (tmp_path / f'{name}.onnx' for name in ('half', 'x'))
    assert half.stat().st_size < .9 * whole.stat().st_size
    run_without_torch('tools/infer_onnx.py', whole, images, '--out', tmp_path / 'onnx')
    run('infer', *paths, images, '--out', tmp_path / 'stock', '--device', 'cpu',
        '--batch-size', 3)
    found, expected = predictions(tmp_path / 'onnx'), predictions(tmp_path / 'stock')
    assert found.keys() == expected.keys() and len(found) == 5
    assert len(set().union(*(x['shares'] for x in expected.values()))) > 2
    for name, stock in expected.items():
        # A pixel or two of 25,600 may lie on the edge between two classes.
        assert found[name]['shares'] == pytest.approx(stock['shares'], abs=1e-4)
        mask = cv2.imread(str(tmp_path / 'onnx/pictures' / name), -1)
        assert mask.shape == (100 if name == 'odd.png' else 160, 160)
        assert mask.max() < 5
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


def test_heads_of_thresholds_are_refused():
    model = build_model(segmentor_config(dict(
        type='FCNHead', in_channels=[8, 16], input_transform='resize_concat', num_convs=1,
        out_channels=1, threshold=.3)))
    with pytest.raises(ValueError, match='decode_head.out_channels=1: .* out_channels=2'):
        choose.choose_part(model, 'model')
    model = build_model(Config(dict(default_scope='mmpretrain', model=dict(
        type='ImageClassifier',
        backbone=dict(BACKBONE, out_indices=(1, )),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='MultiLabelLinearClsHead', num_classes=3, in_channels=16)))))
    with pytest.raises(ValueError, match='head MultiLabelLinearClsHead'):
        choose.choose_part(model, 'model')
    assert choose.choose_part(model, 'backbone').outputs == ['map1']
    with pytest.raises(ValueError, match="part='modell': expected one of"):
        choose.choose_part(model, 'modell')


def test_other_dense_heads_are_named_or_refused():
    """FCOS's third output has a name; the boxes of FCOS and GFL are of other coders."""
    config = detector_config(Path('data'))
    head = config.model.bbox_head
    for kind, changes in (('FCOSHead', dict(strides=[4, 8], norm_cfg=None)),
                          ('GFLHead', dict(reg_max=4, norm_cfg=dict(type='BN')))):
        config.model.bbox_head = dict(
            type=kind, num_classes=3, in_channels=head.in_channels, feat_channels=8,
            stacked_convs=1, **changes)
        if kind == 'GFLHead':
            config.model.bbox_head.update(
                anchor_generator=dict(type='AnchorGenerator', ratios=[1.],
                                      octave_base_scale=4, scales_per_octave=1,
                                      strides=[4, 8]),
                loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True))
        model = build_model(config)
        part = choose.choose_part(model, 'model')
        outs = part(*part.example(1, 64, 64))
        assert len(outs) == len(part.outputs) == len(set(part.outputs))
        assert ('other1' in part.outputs) == (kind == 'FCOSHead')
        with pytest.raises(ValueError, match='bbox_head.bbox_coder=DistancePoint'):
            choose.choose_part(model, 'end-to-end')


def test_what_is_no_number_is_a_difference():
    x = torch.tensor([1., 2.])
    assert verify.relative_difference(x, torch.tensor([1., math.nan])) == math.inf
    assert verify.relative_difference(x, torch.tensor([1., 1.])) == .5
    assert verify.largest(torch.tensor([])) == 0


@pytest.mark.parametrize('preprocessor, divisor', [
    (dict(type='mmdet.DetDataPreprocessor', pad_size_divisor=32), 32),
    (dict(type='mmdet.DetDataPreprocessor', pad_size_divisor=10), 20),
    (dict(type='mmseg.SegDataPreProcessor', test_cfg=dict(size_divisor=16)), 16),
    (dict(type='mmpretrain.ClsDataPreprocessor'), 4)])
def test_padding_fits_the_preprocessor_and_the_part(preprocessor, divisor):
    for toolbox in ('mmdet', 'mmseg', 'mmpretrain'):
        importlib.import_module(f'{toolbox}.models')
    part = Bare(nn.Identity())
    part.divisor = 4
    model = mock.Mock(data_preprocessor=MODELS.build(preprocessor))
    about = metadata.describe(part, model, Config(), None)
    assert json.loads(about['pad_divisor']) == divisor


def test_padding_that_runtimes_lack_is_refused():
    importlib.import_module('mmdet.models')
    grey = MODELS.build(dict(type='mmdet.DetDataPreprocessor', pad_value=114))
    with pytest.raises(ValueError, match='pads with 114: expected 0'):
        metadata.padding_of(grey)


def test_files_that_are_no_model_are_named(tmp_path):
    (tmp_path / 'x.onnx').write_text('no model')
    for runtime in 'onnxruntime', 'openvino':
        with pytest.raises(ValueError, match='x.onnx: no model that ' + runtime):
            TOOLS['infer_onnx'].Model(tmp_path / 'x.onnx', runtime)


def test_a_checkpoint_of_another_model_is_refused(digits, tmp_path):
    """The toolboxes' inferencers would go on with random weights."""
    config = detector_config(digits)
    model = build_model(config)
    paths = save(model, config, tmp_path, tuple('0123456789'))
    loaded = torch.load(paths[1], weights_only=False)
    del loaded['state_dict']['bbox_head.retina_cls.weight']
    torch.save(loaded, paths[1])
    with pytest.raises(SystemExit, match='1 weights are missing: bbox_head.retina_cls'):
        run('infer', *paths, digits / 'images/val', '--out', tmp_path / 'out')
    with pytest.raises(SystemExit, match='expected a config, a .py, .yml'):
        run('infer', *paths[::-1], digits / 'images/val', '--out', tmp_path / 'out')
    with pytest.raises(SystemExit, match='default_scope=None: expected a config of'):
        run('infer', 'configs/_base_/models/lavit_t.py', paths[1], digits / 'images/val',
            '--out', tmp_path / 'out')


def test_average_precision_needs_boxes_and_names_what_it_does_not_know(digits):
    tool, file = TOOLS['infer_onnx'], digits / 'annotations/val.json'
    name = json.loads(file.read_text())['images'][0]['file_name']
    box = dict(bboxes=[[0, 0, 9, 9]], scores=[.5])
    for predictions, message in (
            ({name: dict(bboxes=[], scores=[], labels=[])}, 'found no box'),
            ({'none.png': dict(box, labels=['3'])}, '1 of the images are not in it'),
            ({name: dict(box, labels=['cat'])}, "no class 'cat'")):
        with pytest.raises(SystemExit, match=message):
            tool.average_precision(predictions, file)


def test_images_of_the_same_name_are_refused(digits, tmp_path):
    truth = dict(images=[dict(id=i, file_name=f'{i}/a.png') for i in range(2)],
                 annotations=[], categories=[])
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    with pytest.raises(SystemExit, match='the same name'):
        load_tool('infer_onnx').average_precision({'a.png': {}}, tmp_path / 'truth.json')
    two = {f'{split}/00000.png': {} for split in ('train', 'val')}
    with pytest.raises(SystemExit, match='IMAGES in different folders have the same name'):
        load_tool('infer_onnx').average_precision(two, digits / 'annotations/val.json')


def test_weights_beyond_float16_are_named(tmp_path):
    part = Bare(nn.Conv2d(3, 400, 1))
    part.module.weight.data[0] = 1e6
    path = as_onnx(part, tmp_path / 'x.onnx')
    with pytest.raises(ValueError, match='module.weight.*1e[+]06'):
        shrink.halve_weights(path)


def test_what_int8_cannot_calibrate_is_refused_before_the_export(digits, tmp_path):
    config = detector_config(digits)
    paths = save(build_model(config), config, tmp_path, tuple('0123456789'))
    images, out = digits / 'images/val', tmp_path / 'x.onnx'
    with mock.patch.object(programs, 'export_program', side_effect=AssertionError):
        with pytest.raises(SystemExit, match='dense detection: expected one of '
                           'detection, .*--part end-to-end'):
            run('export', *paths, out, '--int8', images)
        with pytest.raises(SystemExit, match=f'{tmp_path / "none"}: no images there'):
            (tmp_path / 'none').mkdir()
            run('export', *paths, out, '--int8', tmp_path / 'none', '--part',
                'end-to-end')
        config.test_dataloader.dataset.pipeline.insert(2, dict(type='mmdet.Pad'))
        config.dump(paths[0])
        with pytest.raises(SystemExit, match='test pipeline: Pad: expected Resize, '):
            run('export', *paths, out, '--int8', images, '--part', 'end-to-end')


def test_a_file_that_cannot_be_finished_leaves_the_one_before(digits, tmp_path):
    config = detector_config(digits)
    paths = save(build_model(config), config, tmp_path, tuple('0123456789'))
    out = tmp_path / 'out/x.onnx'

    def write(program, part, path, about) -> None:
        path.write_bytes(b'in float32')

    for before in None, b'before':
        if before:
            out.write_bytes(before)
        with mock.patch.object(programs, 'to_onnx', write), mock.patch.object(
                programs, 'export_program'), mock.patch.object(
                shrink, 'halve_weights', side_effect=ValueError('too large')):
            with pytest.raises(SystemExit, match='too large'):
                run('export', *paths, out, '--half')
        assert [path.read_bytes() for path in out.parent.iterdir()] == (
            [before] if before else [])


def test_steps_that_infer_onnx_does_not_know_are_refused():
    """Left out, they would make its predictions others than the framework's."""
    class Crop:
        pass

    steps = metadata.preparation(Config(dict(test_dataloader=dict(dataset=dict(
        pipeline=[dict(type='LoadImageFromFile'), dict(type='mmdet.Resize', scale=32),
                  dict(type='Resize', scale_factor=2.), dict(type=Crop, size=3),
                  dict(type='CenterCrop', crop_size=5),
                  dict(type='mmdet.PackDetInputs')])))))
    assert [step['type'] for step in steps] == ['Resize', 'Resize', 'Crop', 'CenterCrop']
    wrapped = Config(dict(test_dataloader=dict(dataset=dict(
        type='ConcatDataset', datasets=[dict(pipeline=steps), dict(pipeline=[])]))))
    assert metadata.preparation(wrapped) == steps
    assert TOOLS['infer_onnx'].unknown_steps(steps) == ['Resize', 'Crop']
    about = dict(task='"classification"', resize=json.dumps(steps))
    with mock.patch.object(TOOLS['infer_onnx'], 'start_onnxruntime',
                           lambda path: (None, about)):
        with pytest.raises(ValueError, match='x.onnx: test pipeline: Resize, Crop: '):
            TOOLS['infer_onnx'].Model(Path('x.onnx'))


def test_masks_of_many_classes_do_not_wrap():
    logits = np.zeros((1, 300, 2, 3), np.float32)
    logits[0, 290, 0], logits[0, 34, 1] = 1, 1  # 290 is 34 in a byte
    model = mock.Mock(**{'name.side_effect': str})
    shares, mask = TOOLS['infer_onnx'].segmentation(
        model, np.zeros((2, 3, 3), np.uint8), [logits], (2, 3))
    assert mask.tolist() == [[290] * 3, [34] * 3]
    assert shares == dict(shares={'34': .5, '290': .5})
    assert TOOLS['infer_onnx'].segmentation(
        model, mask, [logits[:, :9]], (2, 3))[1].dtype == np.uint8


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
    result = subprocess.run(
        [sys.executable, '-c', code, *map(str, (script, *argv))], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


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
    assert shrink.quantise_linear(
        path, [dict(images=x.numpy()), dict(images=x.flip(0).numpy())]) == 2
    stored = [w.data_type for w in onnx.load(path).graph.initializer
              if len(w.dims) > 1]
    assert sorted(stored) == [onnx.TensorProto.FLOAT] + [onnx.TensorProto.INT8] * 2
    # More would overflow on some processors only.
    assert all(abs(onnx.numpy_helper.to_array(w)).max() <= 64
               for w in onnx.load(path).graph.initializer
               if w.data_type == onnx.TensorProto.INT8 and len(w.dims) > 1)
    with torch.no_grad():
        expected = module(x)
    for runtime in ('onnxruntime', 'openvino'):
        found, = verify.load(path, runtime)(x)
        assert 1e-5 < verify.relative_difference(expected, found) < .05, runtime


class SignalStack(ctypes.Structure):
    _fields_ = [('address', ctypes.c_void_p), ('flags', ctypes.c_int),
                ('size', ctypes.c_size_t)]


@pytest.mark.skipif(sys.platform != 'linux', reason='OpenVINO has it on Linux alone')
def test_a_second_model_leaves_the_stack_for_signals(tmp_path):
    """Two such stacks, freed in turn, leave the process one that is freed."""
    def stack() -> SignalStack:
        found = SignalStack()
        assert sigaltstack(None, ctypes.byref(found)) == 0
        return found

    sigaltstack = ctypes.CDLL(None).sigaltstack
    path, before = tmp_path / 'x.onnx', stack()
    torch.onnx.export(nn.ReLU().eval(), (torch.ones(2), ), path, dynamo=True, verbose=False)
    models = [verify.load(path, 'openvino')]
    first = stack().address
    models.append(verify.load(path, 'openvino'))
    second = stack().address
    sigaltstack(ctypes.byref(before), None)  # whatever the models leave
    assert first == second


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


def test_detector_end_to_end_finds_the_frameworks_boxes(digits, tmp_path, traced_once):
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
    # Options may stand between the paths.
    report = run('export', paths[0], '--part', 'end-to-end', paths[1], '--verify', path)
    assert '1 NonMaxSuppression' in report and '| 3     | 97' in report
    report = run('export', *paths, path.with_suffix('.pt2'), '--part', 'end-to-end',
                 '--verify')
    assert 'difference of torch' in report and '| 3     | 97' in report

    run_without_torch(
        'tools/infer_onnx.py', path, images, '--out', tmp_path / 'onnx')
    report = run('infer', *paths, f'{images}/*.png', '--out', tmp_path / 'stock',
                 '--batch-size', '3', '--device', 'cpu')
    assert '4 images' in report
    report = run('infer_onnx', path, images, '--out', tmp_path / 'openvino',
                 '--runtime', 'openvino', '--annotations',
                 digits / 'annotations/val.json')
    assert 'Average Precision  (AP) @[ IoU=0.50:0.95' in report
    found, expected = predictions(tmp_path / 'onnx'), predictions(tmp_path / 'stock')
    assert predictions(tmp_path / 'openvino').keys() == found.keys()
    assert found.keys() == expected.keys() and len(found) == 4
    # The tool lets OpenVINO compute in bfloat16; this is float32.
    model, openvino = TOOLS['infer_onnx'].Model(path), verify.load(path, 'openvino')
    for name, stock in expected.items():
        assert 5 < len(stock['scores']) and len(set(stock['labels'])) > 1
        image = cv2.imread(str(images / name))
        inputs, size = model.prepare(image)
        outputs = openvino(*(torch.from_numpy(x) for x in inputs.values()))
        by_openvino, _ = TOOLS['infer_onnx'].detection(
            model, image, [x.numpy() for x in outputs], size)
        for boxes in (found[name], by_openvino):
            assert verify.nearest_boxes(*as_dets(boxes), *as_dets(stock)).max() < 1e-4
        for kind in ('onnx', 'stock'):
            assert (tmp_path / kind / 'pictures' / name).stat().st_size


def test_levels_of_one_row_are_no_case_of_their_own(tmp_path):
    """Else a .pt2 file would refuse images smaller than the coarsest stride."""
    config = detector_config(Path('data'))
    config.model.bbox_head.anchor_generator.strides = [64, 128]
    detector = choose.choose_part(build_model(config), 'end-to-end')
    classes, anchors = detector.head.cls_out_channels, detector.head.num_base_priors

    class Candidates(parts.Part):
        task, outputs = 'backbone', ['scores', 'labels', 'anchors', 'deltas']

        def __init__(self) -> None:
            super().__init__()
            self.scores, self.deltas = (nn.ModuleList(
                nn.Conv2d(3, anchors * each, 1, stride) for stride in (64, 128))
                for each in (classes, 4))

        def forward(self, x):
            return detector.candidates(*([conv(x) for conv in convs]
                                         for convs in (self.scores, self.deltas)))

    part, pt2 = Candidates().requires_grad_(False), tmp_path / 'x.pt2'
    programs.to_pt2(programs.export_program(part), pt2)
    rows = verify.largest_differences(part, pt2, 'torch', [(1, 33, 35), (2, 65, 300)])
    assert max(row['difference'] for row in rows) == 0


def vit() -> nn.Module:
    from mmlavit.models.backbones.la_vit import LessAttentionViT
    return LessAttentionViT(
        dict(embed_dims=12, num_layers=2, num_heads=3, feedforward_channels=24),
        img_size=64, out_type='featmap', la_layers=(1, ))


def pvt() -> nn.Module:
    """With less attention where keys are reduced, so for multiples of 32 alone."""
    from mmlavit.models.backbones.la_pvt import LessAttentionPVT
    return LessAttentionPVT(
        pretrain_img_size=64, embed_dims=6, num_stages=1, num_layers=[2],
        num_heads=[1], strides=[4], sr_ratios=[8], patch_sizes=[4], mlp_ratios=[2],
        paddings=[0], out_indices=(0, ), la_layers=[1])


@pytest.mark.parametrize('make, sizes', [
    (vit, [(1, 64, 64), (2, 65, 130), (3, 128, 80)]),
    (pvt, [(1, 64, 64), (2, 96, 160), (3, 128, 96)])], ids=['ViT', 'PVT'])
def test_less_attention_exports_for_any_size(make, sizes, tmp_path):
    """As the stock class does; the first size is the base grid's."""
    model = nn.Module()
    model.backbone = randomise(make())
    model.backbone.eval()  # which returns nothing
    part = choose.choose_part(model, 'backbone')
    rows = verify.largest_differences(
        part, as_onnx(part, tmp_path / 'x.onnx'), 'onnxruntime', [
            (batch, height - 3, width) if make is pvt else (batch, height, width)
            for batch, height, width in sizes])
    assert [row['size'] for row in rows] == sizes
    assert max(row['difference'] for row in rows) < 1e-5


def test_classifier_by_three_ways(digits, tmp_path, traced_once):
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
    whole, int8 = tmp_path / 'x.onnx', tmp_path / 'int8.onnx'
    report = run('export', *paths, whole, '--verify')
    assert 'difference of onnxruntime' in report and '| 3     | 97' in report
    report = run('export', *paths, int8, '--int8', images)
    assert int(re.search(r'(\d+) linear layers in int8', report)[1]) > 5
    assert ' QuantizeLinear' in report
    run_without_torch(
        'tools/infer_onnx.py', whole, file, '--out', tmp_path / 'onnx')
    run('infer_onnx', int8, file, '--out', tmp_path / 'int8')
    (tmp_path / 'images').mkdir()
    (tmp_path / f'images/{file.name}').write_bytes(file.read_bytes())
    cv2.imwrite(str(tmp_path / f'images/{file.stem}.jpg'), cv2.imread(str(file)))
    (tmp_path / 'images/broken.jpg').write_bytes(b'no image')
    report = run('infer', *paths, tmp_path / 'images', '--out', tmp_path / 'stock',
                 '--device', 'cpu')
    assert 'images/broken.jpg' in report and '1 files skipped' in report
    ours, rounded, stock = (predictions(tmp_path / x)[file.name]
                            for x in ('onnx', 'int8', 'stock'))
    assert ours['label'] == stock['label'] and ours['label'] in 'abcdefghij'
    assert ours['score'] == pytest.approx(stock['score'], rel=1e-4)
    assert rounded['score'] != ours['score'] == pytest.approx(rounded['score'], abs=.1)
    # Pictures of files that differ in the suffix alone are apart.
    assert {path.name for path in (tmp_path / 'stock/pictures').iterdir()} == {
        file.name, f'{file.stem}.jpg.png'}


@pytest.mark.parametrize('tool', ['export', 'infer', 'infer_onnx'])
def test_help_waits_for_no_torch(tool):
    """It says the default and an example of each option."""
    text = run_without_torch(f'tools/{tool}.py', '--help')
    options = text.split('options:')[1].split('\n  --')[1:]
    assert options and all('default:' in option for option in options)


@pytest.mark.parametrize('difference, output, message', [
    (2e-4, 'map1', 'x.onnx: map1 at (2, 64, 96): differs by 2.0e-04, expected at most'),
    (math.nan, 'map1', 'differs by nan'), (0., 'dets, 0 boxes', 'no box was found'),
    (1e-5, 'map1', None)])
def test_differences_end_the_tool_with_an_error(difference, output, message, monkeypatch):
    monkeypatch.setattr(verify, 'largest_differences', lambda *args, **kwargs: [
        dict(size=(2, 64, 96), difference=difference, output=output)])
    arguments = None, Path('x.onnx'), 'onnxruntime', 1e-4, 1.
    if message is None:
        TOOLS['export'].verify(*arguments)
    else:
        with pytest.raises(SystemExit, match=re.escape(message)):
            TOOLS['export'].verify(*arguments)
