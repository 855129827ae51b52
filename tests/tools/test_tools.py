"""The command-line tools, run as users run them."""
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import cv2
import pytest
import torch
from mmengine import fileio
from mmengine.config import Config

from builders import run_tool
from mmlavit import launch
from mmlavit.engine.safe_loading import load_from_local

ROOT = Path(__file__).parents[2]


def run(*command, check=True, **env) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300)
    assert not check or result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def test_digits_boxes_and_masks_agree(digits):
    for split in ('train', 'val'):
        data = json.loads((digits / f'annotations/{split}.json').read_text())
        boxes = {image['id']: [] for image in data['images']}
        for annotation in data['annotations']:
            boxes[annotation['image_id']].append(annotation)
        for image in data['images']:
            mask = cv2.imread(
                str(digits / 'masks' / split / image['file_name']), -1)
            outside = mask > 0
            for annotation in boxes[image['id']]:
                x, y, w, h = annotation['bbox']
                assert 0 <= x < x + w <= 160 and 0 <= y < y + h <= 160
                inside = mask[y:y + h, x:x + w] == annotation['category_id'] + 1
                assert inside.mean() > 0.1
                outside[y:y + h, x:x + w] = False
            assert not outside.any()
        for label in range(10):
            assert any((digits / 'classes' / split / str(label)).iterdir())


def test_the_soak_runs(tmp_path):
    ran = run_tool('soak', tmp_path, '--steps', 4, folder='stress')
    assert ran.returncode == 0, ran.stderr
    assert re.search(r'4 steps; second half: .* MiB per 1000 steps', ran.stdout)
    assert (tmp_path / 'work/last_checkpoint').is_file()


def test_every_second_class_of_tiny_imagenet(tmp_path):
    archive, out = tmp_path / 'tiny-imagenet-200', tmp_path / 'out'
    for name in 'dbca':
        for i in range(3):
            path = archive / f'train/{name}/images/{name}_{i}.JPEG'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'{name}{i}')
    (archive / 'val/images').mkdir(parents=True)
    for i, name in enumerate('aabbccdd'):
        (archive / f'val/images/val_{i}.JPEG').write_text(f'{name} {i}')
    (archive / 'val/val_annotations.txt').write_text(''.join(
        f'val_{i}.JPEG\t{name}\t0\t32\t44\t62\n'
        for i, name in enumerate('aabbccdd')))
    for _ in range(2):
        assert '6 training and 4 validation images' in run(
            sys.executable, 'tools/make_tiny_imagenet100.py', archive, out)
    made = {path.relative_to(out).as_posix(): path.read_text()
            for path in out.rglob('*.JPEG')}
    assert made == {
        **{f'train/{c}/{c}_{i}.JPEG': f'{c}{i}' for c in 'ac' for i in range(3)},
        'val/a/val_0.JPEG': 'a 0', 'val/a/val_1.JPEG': 'a 1',
        'val/c/val_4.JPEG': 'c 4', 'val/c/val_5.JPEG': 'c 5'}


def test_digits_fit_images_of_any_size(tmp_path):
    out = tmp_path / 'small'
    run_tool('make_digits', out, '--train', 2, '--val', 2, '--size', 64)
    assert cv2.imread(str(out / 'images/val/00001.png')).shape == (64, 64, 3)
    assert '--size 20: at least 64' in run_tool('make_digits', out, '--size', 20).stderr


def test_digits_are_reproducible_and_nothing_else_is_overwritten(
        digits, tmp_path):
    args = 'make_digits', '--train', 8, '--val', 4
    again = tmp_path / 'again'
    assert run_tool(*args, again).returncode == 0
    for name in ('images/train/00007.png', 'masks/val/00003.png',
                 'annotations/val.json'):
        assert (again / name).read_bytes() == (digits / name).read_bytes()
    assert 'already there' in run_tool(*args, again).stdout

    for name in ('mine', 'again.part'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'file').write_text('x')
    assert run_tool(*args, '--seed', 1, again).returncode == 0
    assert (tmp_path / 'again.part/file').read_text() == 'x'
    assert sorted(os.listdir(tmp_path)) == ['again', 'again.part', 'mine']
    assert 'name another folder' in run_tool(*args, tmp_path / 'mine').stderr
    assert (tmp_path / 'mine/file').read_text() == 'x'


@pytest.mark.parametrize('argv, expected', [
    (['c.py', '--amp'], ['c.py', '--amp']),
    (['c.py', '--resume'],
     ['c.py', '--resume', '--cfg-options', 'load_from=None']),
    (['c.py', '--resume', 'a.pth'],
     ['c.py', '--resume', '--cfg-options', 'load_from=a.pth']),
    (['c.py', '--auto-scale-lr', '--cfg-options', 'a=1', 'b=2'],
     ['c.py', '--cfg-options', 'a=1', 'b=2', '--cfg-options',
      'auto_scale_lr.enable=True']),
])
def test_arguments_that_mmseg_lacks_are_translated(argv, expected):
    assert launch.translate_for_mmseg(argv) == expected


@pytest.mark.parametrize('scope', launch.SCOPES)
@pytest.mark.parametrize('task', ['train', 'test'])
def test_the_toolboxes_scripts_know_the_common_arguments(scope, task):
    script = launch.find_script(scope, task).read_text()
    known = set(re.findall(r"'(--[\w-]+)'", script))
    common = {'--work-dir', '--cfg-options', '--launcher', '--local_rank',
              '--local-rank'}
    if task == 'train':
        common |= {'--amp', '--resume'}
        if scope != 'mmseg':
            common.add('--auto-scale-lr')
    assert common <= known


@pytest.mark.parametrize('command, message', [
    (('tools/dist_train.sh', 'x.py', '--work-dir', 'y'),
     '--work-dir: expected a number of GPUs'),
    (('tools/dist_train.sh', 'x.py', '0'), '0: expected a number of GPUs'),
    (('tools/dist_train.sh', 'x.py', '1'), 'no such config'),
    (('tools/dist_test.sh', 'x.py', 'x.pth', '1'), 'no such config')])
def test_shell_tools_name_what_is_wrong(command, message, free_port):
    assert message in run('bash', *command, check=False, PORT=str(free_port))


def test_shell_tools_ask_for_the_environment(tmp_path):
    """Though the current folder, the root of a clone, has mmlavit."""
    (tmp_path / 'torch').mkdir()
    python = tmp_path / 'python'
    # Without site-packages; there is a torch, but it is not mmlavit's environment.
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    assert 'source .venv/bin/activate' in run(
        'bash', 'tools/dist_train.sh', 'x.py', '1', check=False,
        PATH=f'{tmp_path}:{os.environ["PATH"]}')


def test_shell_tools_name_restarts_that_are_no_number():
    assert 'MAX_RESTARTS=x: expected' in run(
        'bash', 'tools/dist_train.sh', 'x.py', '1', check=False, MAX_RESTARTS='x')


def test_a_config_in_yaml_is_found_behind_values_with_its_suffix(tmp_path):
    config = tmp_path / 'c.yml'
    config.touch()
    assert launch.find_config(['--out', 'r.json', str(config), 'x.pth']) == str(config)
    assert launch.find_config(['--work-dir', 'w.py', str(config)]) == str(config)
    assert launch.find_config(['--out', 'r.json', 'c.py']) == 'c.py'
    assert launch.find_config(['--resume']) is None


def test_config_is_found_behind_resume_and_below_odd_folders(tmp_path):
    argv = ['--work-dir', 'x', '--resume', 'a.py']
    assert launch.translate_for_mmseg(argv) == [
        'a.py', '--work-dir', 'x', '--resume', '--cfg-options', 'load_from=None']
    config = tmp_path / 'lr=1e-4' / 'x.py'
    config.parent.mkdir()
    config.write_text("default_scope = 'none'")
    assert "default_scope='none'" in run(
        sys.executable, 'tools/train.py', config, check=False)


def refused(task: str, *argv) -> str:
    """With what tools/train.py or tools/test.py ends at once, in this process."""
    with mock.patch.object(sys, 'argv', [f'tools/{task}.py', *map(str, argv)]), \
            pytest.raises(SystemExit) as end:
        launch.main(task)
    return end.value.code


def test_wrong_configs_are_named(tmp_path, capsys):
    config = tmp_path / 'c.py'
    config.write_text("default_scope = 'mmpose'")
    report = refused('train', config)
    assert "default_scope='mmpose'" in report and "'mmdet'" in report
    options = ('--cfg-options', 'val_evaluator.ann_file=x.json', '--launcher',
               'none')
    assert refused('train', *options, config) == report
    assert refused('train', tmp_path / 'x.py') == f'{tmp_path}/x.py: no such config'
    assert refused('test') == 2
    report = capsys.readouterr().out
    assert 'usage' in report and 'CHECKPOINT' in report


def test_sync_bn_trains_on_cpu_ranks():
    """In a process of its own: it changes the registry."""
    code = """if True:
        import torch
        from mmcv.cnn import build_norm_layer
        from mmlavit.launch import replace_sync_bn
        replace_sync_bn()
        norm = build_norm_layer(dict(type='SyncBN', requires_grad=True), 3)[1]
        norm(torch.randn(2, 3, 4, 4)).sum().backward()
        print(type(norm).__name__)
    """
    assert run(sys.executable, '-c', code).strip().endswith('BatchNorm2d')


@pytest.mark.parametrize('tool', [
    'dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'
])
def test_shell_tools_say_how_they_are_used(tool):
    assert f'usage: bash tools/{tool}' in run(
        'bash', f'tools/{tool}', check=False)


def test_slurm_passes_everything_on(tmp_path):
    fake = tmp_path / 'srun'
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    path = f'{tmp_path}:{os.environ["PATH"]}'
    words = run('bash', 'tools/slurm_train.sh', 'part', 'job', 'c.py', 'dir',
                '--cfg-options', 'a=b c', PATH=path, GPUS='16').splitlines()
    assert words[:3] == ['-p', 'part', '--job-name=job']
    assert {'--ntasks=16', '--ntasks-per-node=8', '--work-dir=dir',
            'a=b c'} <= set(words)
    assert words[-2:] == ['--launcher', 'slurm']
    words = run('bash', 'tools/slurm_test.sh', 'part', 'job', 'c.py', 'x.pth',
                PATH=path).splitlines()
    assert 'x.pth' in words and words[-2:] == ['--launcher', 'slurm']


def test_ranks_leave_their_process_group(tmp_path, free_port):
    """One that keeps it, or a DDP model in it, is aborted at its end now and then."""
    stock, main = tmp_path / 'stock.py', tmp_path / 'main.py'
    stock.write_text(
        'import torch\n'
        'model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))\n'
        'model(torch.randn(3, 2)).sum().backward()\n'
        'class Runner: pass\n'
        'runner = Runner()\n'
        'runner.self, runner.model = runner, model\n')
    main.write_text(
        'import gc, pathlib, torch\n'
        'from mmlavit import launch\n'
        'def end():\n'
        '    alive = [x for x in gc.get_objects() if type(x).__name__ == "Runner"]\n'
        '    print("kept:", len(alive))\n'
        '    destroy()\n'
        'destroy, torch.distributed.destroy_process_group = (\n'
        '    torch.distributed.destroy_process_group, end)\n'
        f'launch.find_script = lambda *args: pathlib.Path({str(stock)!r})\n'
        'launch.main("train")\n'
        'print("left:", not torch.distributed.is_initialized())\n')
    log = run(sys.executable, main, ROOT / 'configs/lavit_t_in1k.py', '--launcher',
              'pytorch', RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1',
              MASTER_PORT=str(free_port), CUDA_VISIBLE_DEVICES='')
    assert 'kept: 0' in log and 'left: True' in log


def test_two_cpu_processes_train_resume_and_test(digits, tmp_path, free_port):
    """The whole chain over gloo, from the COCO config's child."""
    (tmp_path / 'digits.py').write_text(
        f"_base_ = {str(ROOT / 'configs/retinanet_lavit_digits.py')!r}\n"
        'model = dict(backbone=dict(dp_loss=dict()))\n')
    config = Config.fromfile(tmp_path / 'digits.py')
    work_dir, env = tmp_path / 'work', dict(
        PORT=str(free_port), CUDA_VISIBLE_DEVICES='')
    options = ['--cfg-options', 'train_cfg.val_interval=1',
               'train_dataloader.batch_size=2',
               'model.test_cfg.score_thr=0.0']
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        options += [f'{key}.dataset.data_root={digits}/',
                    f'{key}.num_workers=0', f'{key}.persistent_workers=False']
    for key in ('val_evaluator', 'test_evaluator'):
        options.append(f'{key}.ann_file={digits}/annotations/val.json')
    assert config.train_cfg.max_epochs > 2

    train = ['bash', 'tools/dist_train.sh', config.filename, '2', '--work-dir',
             work_dir]
    log = run(*train, *options, 'train_cfg.max_epochs=1', **env)
    assert 'Distributed launcher: pytorch' in log
    assert 'GPU number: 2' in log
    log = run(*train, '--resume', *options, 'train_cfg.max_epochs=2', **env)
    assert 'resumed epoch: 1, iter: 2' in log
    assert (work_dir / 'epoch_2.pth').is_file()
    lines = [json.loads(line)
             for path in work_dir.glob('*/vis_data/scalars.json')
             for line in path.read_text().splitlines()]
    trained = [line for line in lines if 'loss' in line]
    assert trained
    for line in trained:  # rounded there
        assert line['loss'] == pytest.approx(
            line['loss_cls'] + line['loss_bbox'] + line['loss_dp'], rel=1e-3)

    # The stock tool, unchanged, finds the same in every image.
    checkpoint = work_dir / 'epoch_2.pth'
    run('bash', 'tools/dist_test.sh', config.filename, checkpoint, '2', '--work-dir',
        tmp_path / 'ours', '--out', tmp_path / 'ours.pkl', *options, **env)
    stock = str(launch.find_script('mmdet', 'test'))
    argv = [stock, config.filename, checkpoint, '--work-dir', tmp_path / 'stock',
            '--out', tmp_path / 'stock.pkl', *options]
    with mock.patch.object(sys, 'argv', list(map(str, argv))):
        runpy.run_path(stock, run_name='__main__')  # another process imports for long
    ours, theirs = (fileio.load(tmp_path / f'{name}.pkl') for name in ('ours', 'stock'))
    assert [x['img_id'] for x in ours] == [x['img_id'] for x in theirs]
    for one, other in zip(ours, theirs):
        one, other = one['pred_instances'], other['pred_instances']
        assert len(one['scores']) > 10
        for key in ('labels', 'scores', 'bboxes'):
            torch.testing.assert_close(one[key], other[key])
    assert next((tmp_path / 'ours').glob('2*/2*.json')).read_text().count('mAP') > 1
    state = load_from_local(str(checkpoint))['state_dict']
    assert all(value.isfinite().all() for value in state.values())


def test_wheel_ships_configs_and_tools_for_mim(tmp_path):
    source = tmp_path / 'source'
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns('.venv*', '.git', 'data',
                                                    'work_dirs', '.mim'))
    run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps',
        '--no-build-isolation', '-w', tmp_path, source)
    wheel = next(tmp_path.glob('mmlavit-*.whl'))
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f'mmlavit/.mim/{path.relative_to(ROOT)}'
            for path in [*(ROOT / 'configs').rglob('*.py'),
                         *(ROOT / 'checkpoints').glob('*.pth')]} <= names
    assert {'mmlavit/.mim/tools/train.py', 'mmlavit/.mim/model-index.yml',
            'mmlavit/models/backbones/lavit.py'} <= names
    assert not [name for name in names if name.startswith(('tests', 'tools'))]


@pytest.mark.parametrize('arguments, config', [
    ('--out-item metrics --out r.json c.py x.pth', 'c.py'),
    ('--cfg-options a=b.py c.py', 'c.py'), ('c.yml x.pth', 'c.yml'), ('x.pth', None)])
def test_the_config_is_found_among_the_arguments(arguments, config):
    assert launch.find_config(arguments.split()) == config
