"""tools/ablate.py on a folder of random images."""
import csv
import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmlavit.lavit import resolve_arch

ROOT = Path(__file__).parents[1]
tool = runpy.run_path(str(ROOT / 'tools/ablate.py'))
ARCH = dict(embed_dims=(8, 16), depths=(2, 3), num_heads=(1, 2),
            num_va_layers=(2, 1), strides=(2, 2), patch_sizes=(3, 3))


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (('train', 6), ('test', 4)):
        for label in ('a', 'b'):
            path = tmp_path / 'data' / split / label
            path.mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(path / f'{i}.png'),
                            rng.integers(0, 255, (40, 30, 3), np.uint8))
    (tmp_path / 'config.py').write_text(
        f"_base_ = {str(ROOT / 'configs/lavit_t_in1k.py')!r}\n"
        "model = dict(backbone=dict(_delete_=True, type='LaViT', "
        f'arch={ARCH}, sr_ratios=(2, 1), out_indices=(1, ), dp_loss=dict()), '
        'head=dict(in_channels=16))\n')
    return tmp_path


def test_grid_is_trained_once_resumed_and_summarised(folder, monkeypatch):
    names = ['LaViT', 'identity', 'all VA (the twin)']
    args = [str(folder / 'config.py'), str(folder / 'data'), '--out',
            str(folder / 'out'), '--seeds', '0', '--size', '32', '--batch-size',
            '4', '--workers', '0', '--only', *names]
    tool['main']([*args, '--epochs', '1'])
    rows = {row['variant']: row
            for row in csv.DictReader(open(folder / 'out/ablation.csv'))}
    assert list(rows) == names
    assert all(0 <= float(row['top1']) <= 100 for row in rows.values())
    # Plain reuse makes maps more alike, and has no Theta and Psi; the twin has Q
    # and K instead.
    maps = {name: float(row['maps']) for name, row in rows.items()}
    params = {name: float(row['params']) for name, row in rows.items()}
    assert maps['identity'] > maps['all VA (the twin)']
    assert params['identity'] < min(params['LaViT'],
                                    params['all VA (the twin)'])
    table = (folder / 'out/ablation.md').read_text()
    assert 'Not an ImageNet result' in table
    assert table.count('data at 32 px, 1 epochs, batch 4') == 1 + len(names)
    assert cv2.imread(str(folder / 'out/ablation.png')).std() > 10

    # Cut off between the last checkpoint and its validation: only tested.
    run = folder / 'out/runs/LaViT-seed0'
    log = next(run.glob('*/vis_data/scalars.json'))
    log.write_text(''.join(line for line in open(log) if 'top1' not in line))
    before = (run / 'epoch_1.pth').stat().st_mtime
    tool['main']([*args, '--epochs', '1'])
    assert (run / 'epoch_1.pth').stat().st_mtime == before
    again = {row['variant']: row['top1']
             for row in csv.DictReader(open(folder / 'out/ablation.csv'))}
    assert again == {name: row['top1'] for name, row in rows.items()}

    def refuse(*args, **kwargs):
        pytest.fail('trained what is done')

    monkeypatch.setattr(tool['subprocess'], 'run', refuse)
    tool['main']([*args, '--epochs', '1'])
    with pytest.raises(SystemExit, match='another configuration or budget'):
        tool['main']([*args, '--epochs', '2'])


def test_variants_are_what_they_are_called():
    depths, va = [2, 4, 4], [2, 2, 0]
    layers = {
        name: change['num_va_layers'](depths, va)
        for name, change in tool['VARIANTS'].items()
        if 'num_va_layers' in change
    }
    assert layers == {
        'LA one stage earlier': [1, 2, 0],
        'LA stages only': [2, 4, 0],
        'all VA (the twin)': [2, 4, 4]
    }
    assert tool['VARIANTS']['all VA (the twin)']['dp_loss'] is None
    for name in ('tiny', 'small', 'base'):
        arch = resolve_arch(name, None, (8, 4, 2, 1))
        earlier = tool['one_earlier'](arch['depths'], arch['num_va_layers'])
        assert sum(earlier) < sum(arch['num_va_layers'])


def test_missing_data_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool['main'](['config.py', str(tmp_path)])
    assert 'expected a folder with train/CLASS' in capsys.readouterr().err
    (tmp_path / 'train').mkdir()
    with pytest.raises(SystemExit):
        tool['main'](['config.py', str(tmp_path)])
    assert 'expected one a class' in capsys.readouterr().err
    (tmp_path / 'train/cat').mkdir()
    for config, message in (
            ('no.py', 'no such config'),
            (ROOT / 'configs/retinanet_lavit_t_coco.py', "a classifier's config")):
        with pytest.raises(SystemExit):
            tool['main']([str(config), str(tmp_path)])
        assert message in capsys.readouterr().err
