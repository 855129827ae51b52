"""tools/make_metafiles.py and what it wrote."""
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from modelindex.load_model_index import load  # as mim reads it

from builders import load_tool, run_tool

ROOT = Path(__file__).parents[2]
PUBLISHED = yaml.safe_load((ROOT / 'configs/published.yml').read_text())
DATA = dict(classification='ImageNet-1k', detection='COCO', segmentation='ADE20K',
            tiny_imagenet='Tiny ImageNet (100 classes)')
ROWS = [(table, row) for table in DATA for row in PUBLISHED[table] if 'config' in row]
COLUMNS = {
    'Top 1 Accuracy': 'top1', 'box AP': 'AP', 'mIoU': 'mIoU',
    'mIoU (ms+flip)': 'mIoU_ms'
}


def make(root: Path, *args) -> subprocess.CompletedProcess:
    return run_tool('make_metafiles', *args, root=root)


@functools.lru_cache(maxsize=None)
def models_here() -> dict:
    return models_of(ROOT)


def models_of(root: Path) -> dict:
    return {model.name: model for model in load(str(root / 'model-index.yml')).models}


def figures(model) -> dict:
    return model.results[0].metrics if model.results else {}


@pytest.fixture
def copy(tmp_path):
    """The configs with a row each of ours and the baselines', and the tool."""
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    (tmp_path / 'tools').mkdir()
    shutil.copy(ROOT / 'tools/make_metafiles.py', tmp_path / 'tools')
    published = dict(PUBLISHED, detection=[], segmentation=[], tiny_imagenet=[])
    published['classification'] = [
        dict(model='LaViT-T', config='lavit_t_in1k.py', top1=79.2),
        dict(model='Swin-T', config='baselines/swin-t_in1k.py', top1=81.3),
        dict(model='PVT-T', top1=75.1)]

    def write(**changes):
        published['classification'][0].update(changes)
        (tmp_path / 'configs/published.yml').write_text(yaml.safe_dump(published))
        return tmp_path
    return write


def test_no_metafile_is_stale():
    tool = load_tool('make_metafiles')
    for name, content in tool.make_files(PUBLISHED).items():
        assert (ROOT / name).read_text() == tool.as_text(content), (
            f'{name} is stale: run python tools/make_metafiles.py')


def test_stale_metafiles_are_named_and_mended(copy):
    root = copy()
    done = make(root)
    assert done.returncode == 0, done.stderr
    assert set(models_of(root)) == {'lavit_t_in1k', 'swin-t_in1k'}  # PVT-T: no config
    assert make(root, '--check').returncode == 0
    before = (root / 'configs/metafile.yml').read_text()
    done = make(copy(top1=12.3), '--check')
    assert done.returncode == 1
    assert 'stale: configs/metafile.yml; run' in done.stderr
    assert (root / 'configs/metafile.yml').read_text() == before
    assert make(root).stdout == 'written: configs/metafile.yml\n'
    assert figures(models_of(root)['lavit_t_in1k']) == {
        'Top 1 Accuracy (published)': 12.3}


def test_what_was_trained_here_stands_apart_from_the_published(copy):
    root = copy(trained=dict(weights='https://example.org/t.pth', top1=78.9))
    make(root)
    model = models_of(root)['lavit_t_in1k']
    assert model.weights == 'https://example.org/t.pth'
    assert figures(model) == {
        'Top 1 Accuracy': 78.9, 'Top 1 Accuracy (published)': 79.2}
    # Never the zoo's weights beside our figures.
    root = copy(trained=dict(top1=78.9), weights='https://example.org/zoo.pth')
    make(root)
    assert models_of(root)['lavit_t_in1k'].weights is None


def test_figures_that_would_stand_nowhere_are_an_error(copy):
    with pytest.raises(ValueError, match=r"LaViT-T: trained has \['top5'\]; expected "
                       r"weights and some of \['top1'\]"):
        make(copy(trained=dict(top5=90.)))


def test_every_row_with_a_config_is_a_model():
    models = models_here()
    assert {model.config for model in models.values()} == {
        f"configs/{row['config']}" for _, row in ROWS}
    assert len(models) == len(ROWS)
    for model in models.values():
        assert (ROOT / model.config).is_file()
        folder = Path(model.config).parent.name
        assert model.in_collection == dict(
            configs='LaViT', plugins='Less attention in other transformers').get(folder)
    assert models['lavit_s_in1k'].full_model.paper['URL'].endswith('2406.00427')


@pytest.mark.parametrize('table, row', ROWS, ids=lambda x: x if isinstance(x, str)
                         else x['model'])
def test_models_say_what_their_rows_say(table, row):
    model = models_here()[Path(row['config']).stem]
    trained = row.get('trained')
    assert model.weights == (row if trained is None else trained).get('weights')
    expected = {f'{name} (published)': row[column]
                for name, column in COLUMNS.items() if column in row}
    expected |= {name: trained[column] for name, column in COLUMNS.items()
                 if trained and column in trained}
    assert figures(model) == expected
    data = model.metadata.data
    assert data['Training Data'] == DATA[table]
    assert data.get('FLOPs (published)', 0) == round(row.get('macs', 0) * 1e9)
    assert data.get('Parameters (published)', 0) == round(row.get('params', 0) * 1e6)


@pytest.mark.parametrize('name, unit, length, batch', [
    ('lavit_b_in1k', 'Epochs', 300, 1024), ('deit-s_in1k', 'Epochs', 300, 1024),
    ('retinanet_lavit_s_coco', 'Epochs', 12, 16),
    ('retinanet_lavit_s_3x_coco', 'Epochs', 36, 16),
    ('semantic_fpn_lavit_b_ade20k', 'Iterations', 80000, 16),
    ('upernet_lavit_s_ade20k', 'Iterations', 160000, 16),
])
def test_schedules_are_the_published(name, unit, length, batch):
    data = models_here()[name].metadata.data
    assert (data[unit], data['Batch Size']) == (length, batch)
