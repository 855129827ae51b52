"""Our tools as users run them: help, wrong arguments, and what they write."""
import csv
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from builders import ARCH, digits_config, randomise
from mmlavit.analysis.ablation import VARIANTS
from mmlavit.analysis.building import build_model
from mmlavit.analysis.paper_tables import TABLES
from mmlavit.analysis.peers import PEERS
from mmlavit.models.backbones.arch import ARCHS

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.stem for path in (ROOT / 'tools').glob('*.py'))
NAMES = dict(ablate=VARIANTS, benchmark=PEERS, convert_pvt=ARCHS, tables=TABLES)


def run(tool: str, *args, code=0, options=()) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *options, ROOT / f'tools/{tool}.py', *map(str, args)],
        cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == code, done.stderr[-4000:]
    return done


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of class folders of random images, of one split or more."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 6), ('test', 4)):
        for label in 'ab':
            folder = tmp_path / 'images' / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(folder / f'{i}.png'),
                            rng.integers(0, 255, (40, 30, 3), np.uint8))
    return tmp_path / 'images'


@pytest.fixture
def config(tmp_path) -> Path:
    """Of a small classifier."""
    path = tmp_path / 'config.py'
    path.write_text(
        f"_base_ = {str(ROOT / 'configs/lavit_t_in1k.py')!r}\n"
        "model = dict(backbone=dict(_delete_=True, type='LaViT', "
        f'arch={ARCH}, out_indices=(3, )), head=dict(in_channels=32))\n')
    return path


# Help -----------------------------------------------------------------------
@pytest.mark.parametrize('tool', TOOLS)
def test_help_needs_no_torch_and_explains_every_option(tool):
    done = run(tool, '--help', options=['-X', 'importtime'])
    imported = set(re.findall(r'\| +([\w.]+)$', done.stderr, re.M))
    assert 'site' in imported and not {'torch', 'mmlavit'} & imported
    assert f'{tool}.py' in done.stdout
    if tool in ('train', 'test'):  # whose options are the toolbox's
        return
    # An entry begins two columns in; its text goes on further in.
    _, *sections = re.split(r'\n(?:positional arguments|options):', done.stdout)
    entries = [' '.join(entry.split()) for section in sections
               for entry in re.split(r'\n  (?=\S)', section) if entry.strip()]
    assert any(text.startswith('-h') for text in entries)
    for text in entries:
        if not text.startswith('-h'):
            assert 'e.g. ' in text, text
            assert 'default: ' in text or not text.startswith('-'), text


@pytest.mark.parametrize('tool', NAMES)
def test_help_names_what_there_is_to_choose_from(tool):
    text = ' '.join(run(tool, '--help').stdout.split())
    assert [name for name in NAMES[tool] if name not in text] == []


# Wrong arguments ------------------------------------------------------------
@pytest.mark.parametrize('args, message', [
    (['tables', 'small', '--run', '--gpus', '4'], 'small: expected no --run, --gpus'),
    (['tables', 'small', '--tasks', 'detection', 'detection'], 'expected each once'),
    (['tables', 'small', '--seeds', '0', '0'], '--seeds 0 0: expected each once'),
    (['tables', 'all', '--seeds', '0'], 'expected the table small'),
    (['ablate', 'configs/lavit_t_in1k.py', '--only', 'ResNet'], 'expected DATA with it'),
    (['ablate', 'configs/lavit_t_in1k.py', '--epochs', '0'], '--epochs 0: expected more'),
    (['ablate', 'configs/lavit_t_in1k.py', '--seeds', '1', '1'], 'expected each once'),
    (['benchmark_export', '--batch-size', '0'], '--batch-size 0: at least 1'),
    (['export', 'configs/lavit_t_in1k.py', 'x.pt2', '--runtime', 'openvino'],
     '--runtime: expected --verify'),
    (['benchmark', 'LaViT-S', '--whole'], 'expected the paths of configs'),
    (['benchmark', '--layer', 'x', '--train'], '--layer takes no --train'),
    (['benchmark', '--rounds', '1'], '--rounds 1: at least 2'),
    (['tables', 'detection', '--result', 'x.json'], 'x.json: expected CONFIG=FILE'),
    (['publish_model', 'no.pth', 'out.pth'], 'no.pth: no such file'),
    (['check_data', 'no.py'], 'no.py: no such config'),
    (['check_data', 'configs/lavit_n_digits.py', '--workers', '-1'],
     '--workers -1: expected 0 or more'),
    (['check_data', 'configs/lavit_n_digits.py', '--cfg-options', 'x'],
     '--cfg-options x: expected KEY=VALUE'),
    (['analyze_attention', 'c.py', 'none', '.', '--labels', 'a', 'b'],
     '--labels a b: expected one for each of the 1 models'),
    (['analyze_attention', 'c.py', 'none', '.', '--compare', 'd.py', 'none',
      '--labels', 'a'], 'expected one for each of the 2 models'),
    (['analyze_attention', 'c.py', 'none', '.', '--max-images', '0'],
     '--max-images 0: expected at least 1'),
    (['analyze_attention', 'c.py', 'none', '.', '--points', '1,1'],
     '1,1: expected X,Y as shares'),
])
def test_wrong_arguments_are_named(args, message):
    assert message in run(*args, code=2).stderr


def test_rows_that_are_not_there_are_an_error():
    assert '--only nothing: expected a part of a name' in run(
        'tables', 'all', '--only', 'nothing', code=1).stderr


def test_missing_data_is_named(tmp_path):
    config = ROOT / 'configs/lavit_t_in1k.py'
    for folder, path, message in (
        ('', config, 'expected a folder with train/CLASS'),
        ('train', config, 'expected one a class'),
        ('train/cat', 'no.py', 'no such config')):
        (tmp_path / folder).mkdir(exist_ok=True)
        assert message in run('ablate', path, tmp_path, code=2).stderr
    (tmp_path / 'val/dog').mkdir(parents=True)
    assert 'cat, dog are in one of them alone' in run(
        'ablate', config, tmp_path, code=2).stderr


# What they write ------------------------------------------------------------
def test_benchmark_writes_what_it_prints(tmp_path):
    printed = run('benchmark', 'mmdet.ResNet(depth=18)', '--size', '32', '32',
                  '--batch-size', '1', '--rounds', '2', '--warmup', '0', '--device',
                  'cpu', '--out', tmp_path).stdout
    saved = json.loads((tmp_path / 'benchmark.json').read_text())
    row, = csv.DictReader(open(tmp_path / 'benchmark.csv'))
    assert row['size'] == '32x32' and row['model'] == 'mmdet.ResNet(depth=18)'
    result = saved['results']['32x32']['mmdet.ResNet(depth=18)']
    assert f"| {row['ms (p10-p90)']} " in printed
    assert row['ms (p10-p90)'].startswith(f"{result['ms']:.1f} (")
    assert cv2.imread(str(tmp_path / 'benchmark.png')).std() > 10
    assert 'No model is left' in run(
        'benchmark', 'LaViT(arch="tiny", in_channels=4)', '--size', '32', '32',
        '--device', 'cpu', code=1).stderr


def test_ablation_trains_in_a_process_of_its_own(images, config, tmp_path):
    out = tmp_path / 'out'
    printed = run('ablate', config, images, '--out', out, '--epochs', '1', '--seeds',
                  '0', '--size', '32', '--batch-size', '4', '--workers', '0',
                  '--only', 'identity', '--analysed-images', '4').stdout
    row, = csv.DictReader(open(out / 'ablation.csv'))
    assert row['variant'] == 'identity' and 0 <= float(row['score']) <= 100
    table = (out / 'ablation.md').read_text()
    assert table in printed and 'Not an ImageNet result' in table
    assert table.count('images at 32 px (1 keys), 1 epochs, batch 4') == 2
    assert '| layer 0 |' in table
    assert cv2.imread(str(out / 'ablation.png')).std() > 10


def test_cams_are_drawn_of_what_can_be_read(digits, tmp_path):
    config = digits_config(digits)
    config.dump(tmp_path / 'config.py')
    torch.save(dict(state_dict=randomise(build_model(config)).state_dict()),
               tmp_path / 'x.pth')
    folder = tmp_path / 'images'
    folder.mkdir()
    shutil.copy(next((digits / 'classes/val/3').iterdir()), folder / 'a.png')
    (folder / 'b.png').write_bytes(b'no image')
    done = run('cam', tmp_path / 'config.py', tmp_path / 'x.pth', folder, '--size', '64',
               '96', '--category', '3', '--out', tmp_path / 'cam')
    assert 'b.png: not a readable image, skipped' in done.stderr
    assert f'{tmp_path}/cam/a.png: 3, score ' in done.stdout
    assert cv2.imread(str(tmp_path / 'cam/a.png')).shape == (64, 96, 3)
    assert not (tmp_path / 'cam/b.png').exists()


def test_analysis_writes_measures_and_pictures_of_two_models(
        images, config, tmp_path):
    """LaViT, and mmpretrain's plain ViT."""
    (tmp_path / 'deit.py').write_text(
        f"_base_ = {str(ROOT / 'configs/baselines/deit-s_in1k.py')!r}\n"
        'model = dict(backbone=dict(_delete_=True, type="VisionTransformer", '
        'img_size=(64, 96), arch=dict(embed_dims=8, num_layers=3, num_heads=2, '
        'feedforward_channels=16)), head=dict(in_channels=8))\n')
    out = tmp_path / 'out'
    printed = run(
        'analyze_attention', config, 'none', images, '--compare',
        tmp_path / 'deit.py', 'none', '--size', '64', '90', '--out', out,
        '--batch-size', '2', '--max-images', '3', '--heads', '--device', 'cpu').stdout
    results = json.loads((out / 'similarity.json').read_text())
    assert [results[name]['images'] for name in ('config', 'deit')] == [3, 3]
    rows = list(csv.DictReader(open(out / 'similarity.csv')))
    assert [row['kind'] for row in rows] == (
        [layer['kind'] for layer in results['config']['layers']] + ['VA'] * 3)
    assert all(float(row['map_similarity_to_previous']) > 0 for row in rows[-2:])
    for picture in ('similarity', 'attention', 'features'):
        assert cv2.imread(str(out / f'{picture}.png')).std() > 10
    line = next(x for x in printed.splitlines() if 'tokens: mean pairwise' in x)
    layers = results['deit']['layers']
    mean = sum(layer['token_similarity'] for layer in layers) / len(layers)
    assert line.split('|')[3].strip() == f'{mean:.3f}'


def test_analysis_of_pvt_and_swin_with_less_attention(images, tmp_path, monkeypatch):
    """Swin attends within windows: no picture of where points of an image look."""
    (tmp_path / 'pvt.py').write_text(
        f"_base_ = {str(ROOT / 'configs/plugins/la-pvt-s_in1k.py')!r}\n"
        'model = dict(backbone=dict(_delete_=True, type="LessAttentionPVT", '
        'embed_dims=6, num_layers=[1, 1, 3, 2], num_heads=[1, 2, 3, 4], num_va_layers='
        '(1, 1, 2, 0), mlp_ratios=[1] * 4, out_indices=(3, )), '
        'head=dict(in_channels=24))\n')
    (tmp_path / 'swin.py').write_text(
        f"_base_ = {str(ROOT / 'configs/plugins/la-swin-t_in1k.py')!r}\n"
        'model = dict(backbone=dict(_delete_=True, type="LessAttentionSwinClassifier", '
        'arch=dict(embed_dims=8, depths=(2, 4), num_heads=(1, 2)), la_layers=(4, 5), '
        'out_indices=(1, )), head=dict(in_channels=16))\n')
    swin, pvt = ([tmp_path / f'{name}.py', 'none'] for name in ('swin', 'pvt'))
    options = ['--size', 64, 64, '--max-images', 2, '--heads', '--device', 'cpu']
    for args in ([*swin, images], [*swin, images, '--compare', *pvt]):
        out = tmp_path / str(len(args))
        argv = ['analyze_attention', *args, '--out', out, *options]
        monkeypatch.setattr(sys, 'argv', [str(arg) for arg in argv])
        runpy.run_path(str(ROOT / 'tools/analyze_attention.py'), run_name='__main__')
        assert cv2.imread(str(out / 'similarity.png')).std() > 10
        assert cv2.imread(str(out / 'features.png')).std() > 10
        assert (out / 'attention.png').exists() == (pvt[0] in args)
    rows = list(csv.DictReader(open(out / 'similarity.csv')))
    kinds = {model: ''.join(row['kind'][0] for row in rows if row['model'] == model)
             for model in ('swin', 'pvt')}
    assert kinds == dict(swin='VVVVLL', pvt='VVVVLLL')
    # Windows of the same shift are compared, as one inherits from the other.
    alike = [row['map_similarity_to_previous'] for row in rows[:6]]
    assert [value == '' for value in alike] == [True] * 4 + [False] * 2


def test_data_check_ends_with_1_if_there_are_errors(images, tmp_path):
    def loader(split):
        return dict(dataset=dict(
            type='CustomDataset', data_root=str(images / split), pipeline=[
                dict(type='LoadImageFromFile'), dict(type='PackInputs')]))

    path = tmp_path / 'data.py'
    path.write_text("default_scope = 'mmpretrain'\n"
                    f'train_dataloader = {loader("train")}\n'
                    'val_dataloader = train_dataloader\n')
    printed = run('check_data', path, '--workers', '0').stdout
    assert 'train: CustomDataset: 12 images of 12' in printed
    assert 'val: checked above' in printed and 'test: not in the config' in printed
    assert printed.endswith('\n0 kinds of errors, 0 of warnings\n')
    (images / 'train/a/0.png').write_text('text')
    printed = run('check_data', path, '--workers', '0', '--splits', 'val',
                  '--cfg-options', 'model.head.num_classes=3', code=1).stdout
    assert 'model.head.num_classes=3, the data set has 2' in printed
    assert 'ERROR: unreadable image: 1' in printed
    assert printed.endswith('\n2 kinds of errors, 0 of warnings\n')


def test_publishing_says_what_it_wrote(tmp_path):
    torch.save(dict(meta=dict(epoch=3), state_dict=dict(x=torch.ones(2))),
               tmp_path / 'epoch_3.pth')
    (tmp_path / 'result.json').write_text('{"accuracy/top1": 50.0}')
    printed = run('publish_model', tmp_path / 'epoch_3.pth', tmp_path / 'x.pth',
                  '--results', tmp_path / 'result.json').stdout
    file, = tmp_path.glob('x-*.pth')
    assert printed.startswith(f'{file}: 0.0 MB') and '50.0' in printed
