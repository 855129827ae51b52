"""Damaged and hostile checkpoints, kills, full disks, invalid losses."""
import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from builders import (ARCH, RANDOM_IMAGES, assert_same, autocast, digits_config,
                      leave_process_group, make_runner, train)
from mmengine.config import Config
from mmengine.dist import all_reduce
from mmengine.fileio import dump, get_file_backend
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseTTAModel
from mmengine.runner.checkpoint import _load_checkpoint
from torch import nn

from mmlavit import LaViT
from mmlavit.engine import safe_loading
from mmlavit.engine.checkpoint_hook import as_plain_data
from mmlavit.engine.invalid_loss import InvalidLossHook
from mmlavit.launch import find_script

ROOT = Path(__file__).parents[2]
# What is for old torch runs on a new one too, but not the other way round.
LOADERS = [True, False] if safe_loading.SAFE_BY_DEFAULT else [False]


class Call:
    """Harmless here; loading its pickle calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.fixture(scope='module')
def trained(digits, tmp_path_factory) -> Path:
    """Three epochs that nothing disturbed."""
    work_dir = tmp_path_factory.mktemp('trained')
    train(digits_config(digits), work_dir)
    return work_dir


def weights(path: Path) -> dict:
    return safe_loading.load_from_local(str(path))['state_dict']


# Files ----------------------------------------------------------------------
def bad_file(kind: str, path: Path, good: Path) -> None:
    ran = str(path.with_suffix('.ran'))
    if kind == 'truncated':
        path.write_bytes(good.read_bytes()[:-1000])
    elif kind == 'code':
        torch.save(dict(state_dict={}, meta=Call(os.mkdir, ran)), path)
    elif kind == 'code by getattr':  # which HistoryBuffer needs
        torch.save(dict(meta=Call(getattr, HistoryBuffer, '__init__')), path)
    elif kind == 'code by getattr of a tensor':
        torch.save(dict(meta=Call(getattr, torch.Tensor, 'backward')), path)
    elif kind == 'code in an old file':
        torch.save(dict(meta=Call(os.mkdir, ran)), path,
                   _use_new_zipfile_serialization=False)
    elif kind == 'code in a plain pickle':
        path.write_bytes(pickle.dumps(Call(os.mkdir, ran), protocol=2))
    elif kind == 'a list':
        torch.save([torch.zeros(3)], path)
    elif kind == 'no weights':
        torch.save(dict(state_dict=None), path)
    elif kind == 'a nameless weight':
        torch.save(dict(state_dict={('a', 1): torch.zeros(3)}), path)
    elif kind in ('blown up', 'twice the same'):
        torch.save(dict(x=torch.zeros(3)), path)
        with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as archive:
            name = archive.namelist()[0]
            archive.writestr(*(('more', bytes(10**7)) if kind == 'blown up'
                               else (name, archive.read(name))))
    else:
        path.write_bytes(dict(empty=b'', text=b'hello, this is text\n',
                              picture=b'\x89PNG\r\n\x1a\n' + bytes(99))[kind])


BAD = dict(
    truncated='damaged', empty='of 0 bytes', text='no checkpoint',
    picture='no checkpoint', code='could run code',
    **{'code by getattr': "could run code.*'__init__'",
       'code by getattr of a tensor': "could run code.*'backward'",
       'code in an old file': 'could run code',
       'code in a plain pickle': 'could run code',
       'a list': 'holds a list', 'no weights': 'state_dict is a NoneType',
       'a nameless weight': r"the name \('a', 1\), a tuple",
       'blown up': 'unpacked to 1000[0-9]{4} bytes',
       'twice the same': 'two entries of one name'})


@pytest.mark.parametrize('kind', BAD)
@pytest.mark.parametrize('new_torch', LOADERS)
def test_bad_files_are_refused_by_name_and_unrun(kind, new_torch, trained,
                                                 tmp_path, monkeypatch):
    monkeypatch.setattr(safe_loading, 'SAFE_BY_DEFAULT', new_torch)
    path = tmp_path / 'bad.pth'
    bad_file(kind, path, trained / 'epoch_1.pth')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=BAD[kind]) as error:
        _load_checkpoint(str(path), map_location='cpu')
    assert str(error.value).startswith(f'{path}: ')
    assert 'weights_only' not in str(error.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['bad.pth']  # what the code would have made


@pytest.mark.parametrize('new_torch', LOADERS)
def test_log_and_optimizer_of_a_checkpoint_are_read(new_torch, trained,
                                                    tmp_path, monkeypatch):
    monkeypatch.setattr(safe_loading, 'SAFE_BY_DEFAULT', new_torch)
    read = _load_checkpoint(str(trained / 'epoch_3.pth'), map_location='cpu')
    assert isinstance(read['message_hub']['log_scalars']['train/loss'],
                      HistoryBuffer)
    assert read['optimizer']['state'][0]['step'] == 12
    saved = dict(
        best=np.float64(0.5), f32=np.float32(2), flag=np.bool_(True),
        array=np.arange(3), raw=b'\x00\xff',
        parameter=torch.nn.Parameter(torch.ones(2)))
    torch.save(saved, tmp_path / 'x.pth')
    read = _load_checkpoint(str(tmp_path / 'x.pth'))
    assert str(read) == str(saved)


@pytest.mark.parametrize('kind', ['code', 'code in an old file', 'text'])
def test_downloads_are_refused_unrun_too(kind, served):
    folder, address = served
    bad_file(kind, folder / 'bad.pth', folder)
    init_cfg = dict(type='Pretrained', checkpoint=f'{address}/bad.pth',
                    prefix='backbone.')
    with pytest.raises(ValueError, match=BAD[kind]) as error:
        LaViT(ARCH, init_cfg=init_cfg).init_weights()
    assert f'{address}/bad.pth, which was downloaded to' in str(error.value)
    assert 'weights_only' not in str(error.value)
    assert os.listdir(folder) == ['bad.pth']  # what the code would have made


def test_downloads_are_loaded_and_kept(served):
    folder, address = served
    saved = LaViT(ARCH).state_dict()
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in saved.items()}),
               folder / 'good.pth')
    for _ in range(2):  # the second time from the cache
        model = LaViT(ARCH, init_cfg=dict(
            type='Pretrained', checkpoint=f'{address}/good.pth',
            prefix='backbone.'))
        model.init_weights()
        assert_same(model.state_dict(), saved)
        (folder / 'good.pth').unlink(missing_ok=True)


class Keeper(Hook):
    """Puts something into checkpoints."""

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['kept'] = Call(print, 'ran code')


def test_what_a_training_writes_it_can_read(digits, tmp_path):
    """Schedules that hold methods; classes with more than names."""
    config = digits_config(digits, param_scheduler=dict(
        type='OneCycleLR', eta_max=1e-3, total_steps=12, by_epoch=False))
    config.train_dataloader.dataset.metainfo = dict(
        classes=tuple('0123456789'), info=dict(by=[dict(a=1)], colours={7}))
    whole = train(config, tmp_path / 'whole')
    (tmp_path / 'parts').mkdir()
    (tmp_path / 'whole/epoch_2.pth').rename(tmp_path / 'parts/epoch_2.pth')
    assert_same(train(config, tmp_path / 'parts', resume=True), whole)
    meta = safe_loading.load_from_local(
        str(tmp_path / 'whole/epoch_3.pth'))['meta']['dataset_meta']
    assert meta['classes'] == tuple('0123456789')
    assert meta['info'] == dict(by=[dict(a=1)], colours=[7])
    odd = dict(path=tmp_path, array=np.array(['a']), number=np.float64(2), f=print,
               other=object(), tensor=torch.ones(1), none=None, yes=True)
    assert as_plain_data(odd) == dict(
        path=str(tmp_path), array=['a'], number=2., other=None,
        tensor=torch.ones(1), none=None, yes=True)


def test_what_it_could_not_read_again_stops_it_at_once(digits, tmp_path, capsys):
    runner = make_runner(digits_config(digits), tmp_path)
    runner.register_hook(Keeper())
    with pytest.raises(ValueError, match='refused.*wrote it just now'):
        runner.train()
    assert os.listdir(tmp_path).count('epoch_1.pth') == 1
    assert not (tmp_path / 'epoch_2.pth').exists()
    assert 'ran code' not in capsys.readouterr().out


# A checkpoint and its model -------------------------------------------------
def test_pretrained_weights_must_be_of_this_architecture(tmp_path):
    def save(arch):
        torch.save(dict(state_dict={
            f'backbone.{k}': v for k, v in LaViT(arch).state_dict().items()
        }), tmp_path / 'x.pth')

    def load(arch, prefix='backbone.', **kwargs):
        LaViT(arch, init_cfg=dict(
            type='Pretrained', checkpoint=str(tmp_path / 'x.pth'),
            prefix=prefix), **kwargs).init_weights()

    tiny = dict(ARCH, depths=(2, 2, 2, 2))
    save(tiny)
    load(tiny)
    load(tiny, out_indices=(0, 1))
    for wrong, named in ((ARCH, 'stages.2.blocks.2 is not in the checkpoint'),
                         (dict(tiny, embed_dims=(8, 16, 24, 64)),
                          'stages.3.patch_embed.conv.weight is')):
        with pytest.raises(ValueError, match=named) as error:
            load(wrong)
        assert str(tmp_path / 'x.pth') in str(error.value)
    with pytest.raises(ValueError, match="set init_cfg's prefix='backbone.'"):
        load(tiny, prefix=None)
    with pytest.raises(ValueError, match='x.pth: neck. is not in the pre'):
        load(tiny, prefix='neck.')
    save(ARCH)
    with pytest.raises(ValueError, match='blocks.2 is in the checkpoint alone'):
        load(tiny)
    patches = {name: x for name, x in LaViT(tiny).state_dict().items()
               if 'patch_embed' in name}
    torch.save(patches, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='blocks.0 is not in the .*Check arch'):
        load(tiny, prefix=None)
    torch.save(torch.nn.Conv2d(3, 8, 7).state_dict(), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match="begins with 'weight'"):
        load(tiny, prefix=None)


def detector(digits: Path) -> Config:
    config = Config.fromfile(ROOT / 'configs/retinanet_lavit_digits.py')
    for name in ('train', 'val', 'test'):
        loader = config[f'{name}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{digits}/'
    for name in ('val', 'test'):
        config[f'{name}_evaluator'].ann_file = (
            f'{digits}/annotations/val.json')
    config.model.backbone.arch.update(ARCH, mlp_ratios=(4, 4, 4, 4))
    config.model.backbone.pretrain_img_size = 32
    config.model.neck.in_channels = [8, 16, 24, 32]
    return config


def test_a_test_with_weights_of_another_toolbox_stops(digits, trained,
                                                      tmp_path):
    """A classifier's of the same backbone, which mmengine would only log."""
    path = str(trained / 'epoch_3.pth')
    runner = make_runner(detector(digits), tmp_path, load_from=path)
    with pytest.raises(ValueError, match='not of this model') as error:
        runner.test()
    assert str(error.value).startswith(f'{path}: ')
    assert 'weights are missing: neck.' in str(error.value)
    # To begin a training with is another thing.
    runner = make_runner(detector(digits), tmp_path, load_from=path)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.load_or_resume()
    name = 'stages.0.blocks.0.attn.q.weight'
    assert torch.equal(runner.model.backbone.state_dict()[name],
                       weights(path)[f'backbone.{name}'])


def test_weights_fit_a_model_with_averaging_over_views_on_several_gpus(
        digits, trained, tmp_path):
    """``--tta``, whose model is in two wrappers there."""
    runner = make_runner(digits_config(digits), tmp_path,
                         load_from=str(trained / 'epoch_3.pth'))

    class Averaging(BaseTTAModel):
        def merge_preds(self, samples):
            return samples

    runner.model = torch.nn.DataParallel(Averaging(runner.model))
    checkpoint = safe_loading.load_from_local(str(trained / 'epoch_3.pth'))
    runner.call_hook('after_load_checkpoint', checkpoint=checkpoint)
    del checkpoint['state_dict']['head.fc.weight']
    with pytest.raises(ValueError, match='1 weights are missing: head.fc.weight'):
        runner.call_hook('after_load_checkpoint', checkpoint=checkpoint)


@pytest.mark.parametrize('options, named', [
    (dict(resume=True), '204 weights are missing: backbone.stages'),
    (dict(), '0 of its 2 weights fit the model'),
])
def test_training_goes_on_with_nothing_else(options, named, digits, tmp_path):
    path = str(tmp_path / 'x.pth')
    torch.save(dict(state_dict=torch.nn.Linear(2, 2).state_dict()), path)
    config = digits_config(digits)
    runner = make_runner(config, tmp_path / 'work', load_from=path, **options)
    with pytest.raises(ValueError) as error:
        runner.train()
    assert str(error.value).startswith(f'{path}: ')
    assert named in str(error.value)
    assert not list((tmp_path / 'work').glob('*.pth'))


def test_the_stock_tools_refuse_them_too(digits, tmp_path):
    bad_file('code', tmp_path / 'bad.pth', tmp_path)
    config = tmp_path / 'config.py'
    digits_config(digits).dump(config)
    result = subprocess.run(
        [sys.executable, find_script('mmpretrain', 'train'), config, '--resume',
         tmp_path / 'bad.pth', '--work-dir', tmp_path / 'work'],
        capture_output=True, text=True)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f'ValueError: {tmp_path}/bad.pth: refused'), last
    assert not (tmp_path / 'bad.ran').exists()
    assert not list((tmp_path / 'work').glob('*.pth'))


# Kills and full disks -------------------------------------------------------
KILLED_WHILE_WRITING = '''
import os, runpy, signal, sys
import mmlavit
replace = os.replace
def kill_at_the_second(part, path):
    if path.endswith('epoch_2.pth'):
        os.truncate(part, os.path.getsize(part) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(part, path)
os.replace = kill_at_the_second
sys.argv = ['train.py'] + sys.argv[1:]
runpy.run_path('tools/train.py', run_name='__main__')
'''


def test_killed_while_writing_and_resumed_is_as_if_nothing_had_been(
        digits, trained, tmp_path):
    config = digits_config(digits)
    config.dump(tmp_path / 'config.py')
    work_dir = tmp_path / 'work'
    result = subprocess.run(
        [sys.executable, '-c', KILLED_WHILE_WRITING, tmp_path / 'config.py',
         '--work-dir', work_dir], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    left = {path.name for path in work_dir.glob('*.pth*')}
    assert left == {'epoch_1.pth', 'epoch_2.pth.part'}
    assert_same(weights(work_dir / 'epoch_1.pth'),
                weights(trained / 'epoch_1.pth'))
    resumed = train(config, work_dir, resume=True)
    assert_same(resumed, weights(trained / 'epoch_3.pth'))
    assert not list(work_dir.glob('*.part'))


@pytest.mark.parametrize('named', ['', 'gone.pth', 'epoch_2.pth', None])
def test_resumes_from_the_last_whole_checkpoint(named, digits, trained,
                                                tmp_path):
    """Whatever became of the file that names it."""
    (tmp_path / 'epoch_1.pth').write_bytes(
        (trained / 'epoch_1.pth').read_bytes())
    (tmp_path / 'epoch_2.pth').write_bytes(
        (trained / 'epoch_2.pth').read_bytes()[:-9999])
    if named is not None:
        (tmp_path / 'last_checkpoint').write_text(named and
                                                  str(tmp_path / named))
    resumed = train(digits_config(digits), tmp_path, resume=True)
    assert_same(resumed, weights(trained / 'epoch_3.pth'))


def test_checkpoints_named_by_a_template_of_numbers_are_found(digits, trained, tmp_path):
    (tmp_path / 'epoch_001.pth').write_bytes((trained / 'epoch_1.pth').read_bytes())
    config = digits_config(digits, default_hooks__checkpoint=dict(
        type='CheckpointHook', interval=1, filename_tmpl='epoch_{:03d}.pth'))
    assert_same(train(config, tmp_path, resume=True), weights(trained / 'epoch_3.pth'))
    assert (tmp_path / 'epoch_003.pth').is_file()


def test_a_published_file_is_not_resumed(digits, trained, tmp_path):
    for name in ('epoch_1.pth', 'epoch_2-9a8b7c6d.pth'):
        (tmp_path / name).write_bytes((trained / 'epoch_1.pth').read_bytes())
    runner = make_runner(digits_config(digits), tmp_path, resume=True)
    runner.call_hook('before_run')
    assert runner._load_from == str(tmp_path / 'epoch_1.pth')


def test_no_config_in_a_checkpoint_is_run(digits, trained, tmp_path):
    """mmengine executes the text when it resumes."""
    checkpoint = safe_loading.load_from_local(str(trained / 'epoch_2.pth'))
    checkpoint['meta']['config'] = f"a = open('{tmp_path}/ran', 'w')"
    torch.save(checkpoint, tmp_path / 'x.pth')
    resumed = train(digits_config(digits), tmp_path / 'work', resume=True,
                    load_from=str(tmp_path / 'x.pth'))
    assert_same(resumed, weights(trained / 'epoch_3.pth'))
    assert not (tmp_path / 'ran').exists()


def test_a_file_that_may_not_be_read_is_not_called_damaged(trained, monkeypatch):
    def deny(*args, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(safe_loading.torch, 'load', deny)
    with pytest.raises(PermissionError):
        safe_loading.load_from_local(str(trained / 'epoch_1.pth'))


@pytest.mark.parametrize('kind, raised, words', [
    (RuntimeError('[enforce fail at alloc_cpu.cpp:127] err == 0'), MemoryError,
     r'no memory for its \d+ bytes'),
    (MemoryError(), MemoryError, r'no memory for its \d+ bytes'),
    (RuntimeError('Attempting to deserialize object on a CUDA device but'), ValueError,
     "map_location='cpu'")])
def test_a_file_that_this_machine_cannot_hold_is_not_called_damaged(
        kind, raised, words, trained, monkeypatch):
    def fail(*args, **kwargs):
        raise kind

    monkeypatch.setattr(safe_loading.torch, 'load', fail)
    with pytest.raises(raised, match=f'epoch_1.pth: .*{words}'):
        safe_loading.load_from_local(str(trained / 'epoch_1.pth'))


def test_moved_work_directory_resumes_its_last_checkpoint(digits, trained,
                                                          tmp_path):
    """By the name, not by the time at which a file was copied."""
    for i, epoch in enumerate((11, 9, 10)):
        path = tmp_path / f'epoch_{epoch}.pth'
        path.write_bytes((trained / 'epoch_1.pth').read_bytes())
        os.utime(path, (i, i))

    def resumed_from():
        runner = make_runner(digits_config(digits), tmp_path, resume=True)
        runner.call_hook('before_run')
        return runner._load_from

    (tmp_path / 'last_checkpoint').write_text('/gone/epoch_10.pth')
    assert resumed_from() == str(tmp_path / 'epoch_10.pth')
    (tmp_path / 'last_checkpoint').unlink()
    assert resumed_from() == str(tmp_path / 'epoch_11.pth')


def fill_disk(monkeypatch, at: str) -> None:
    fsync = os.fsync

    def full(file):
        if at in os.readlink(f'/proc/self/fd/{file}'):
            raise OSError(errno.ENOSPC, 'No space left on device')
        fsync(file)

    monkeypatch.setattr(os, 'fsync', full)


def test_full_disk_leaves_the_last_checkpoint(digits, trained, tmp_path,
                                              monkeypatch):
    config = digits_config(
        digits, default_hooks__checkpoint=dict(
            type='CheckpointHook', interval=1, max_keep_ckpts=1))
    with monkeypatch.context() as patch:
        fill_disk(patch, 'epoch_2.pth')
        with pytest.raises(OSError, match='No space left on device') as error:
            train(config, tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / 'epoch_2.pth')
    assert [path.name for path in tmp_path.glob('*.pth*')] == ['epoch_1.pth']
    resumed = train(config, tmp_path, resume=True)
    assert_same(resumed, weights(trained / 'epoch_3.pth'))
    assert all('max_keep_ckpts=1 keeps 2' in path.read_text()
               for path in tmp_path.glob('*/*.log'))


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'best.pth'
    backend = get_file_backend(str(path))
    backend.put(b'good', path)
    dump(dict(a=1), tmp_path / 'new/x.json')
    assert (tmp_path / 'new/x.json').read_text() == '{"a": 1}'
    (tmp_path / 'link.pth').symlink_to('new/linked.pth')
    backend.put(b'x', tmp_path / 'link.pth')
    assert (tmp_path / 'link.pth').is_symlink()
    assert (tmp_path / 'new/linked.pth').read_bytes() == b'x'
    backend.put(b'x', '/dev/null')
    assert Path('/dev/null').is_char_device()
    (tmp_path / 'link.pth').unlink()
    fill_disk(monkeypatch, 'best.pth')
    with pytest.raises(OSError, match='what was there before is as it was'):
        backend.put(b'better', path)
    with pytest.raises(OSError, match='what was there before is as it was'):
        dump(dict(a=2), path, file_format='json')
    assert path.read_bytes() == b'good'
    assert sorted(os.listdir(tmp_path)) == ['best.pth', 'new']


def write_often(rank: int, path: str, length: int) -> None:
    with mock.patch('mmengine.dist.utils.get_rank', return_value=rank):
        for _ in range(40):
            dump(dict(x='0' * length), path, file_format='json')
            get_file_backend(path).put(b'0' * length, f'{path}.png')


def test_ranks_that_write_the_same_file_leave_one_of_theirs(tmp_path):
    """As mmengine's ranks do with the metrics of a test, the toolboxes' with pictures."""
    path = tmp_path / 'x.json'
    ranks = [multiprocessing.get_context('fork').Process(
        target=write_often, args=(rank, str(path), length))
        for rank, length in enumerate((10, 5000, 500))]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks):
        if path.is_file():
            assert len(json.loads(path.read_text())['x']) in (10, 5000, 500)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert sorted(os.listdir(tmp_path)) == ['x.json', 'x.json.png']


# Invalid losses and repeatability -------------------------------------------
class Overflow(Hook):
    """At the second step of the second epoch, the images are huge."""
    scale = float('inf')

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 5:
            data_batch['inputs'] = [
                image * self.scale for image in data_batch['inputs']]


def test_invalid_loss_stops_before_the_weights_take_it(digits, trained,
                                                       tmp_path):
    runner = make_runner(digits_config(digits), tmp_path)
    runner.register_hook(Overflow())
    with pytest.raises(FloatingPointError) as error:
        runner.train()
    message = str(error.value)
    assert message.startswith('Step 6: loss=nan.')
    assert 'first that is not finite is of backbone.stages.0.patch' in message
    assert str(tmp_path / 'epoch_1.pth') in message
    assert {path.name for path in tmp_path.glob('*.pth*')} == {'epoch_1.pth'}
    assert all(x.isfinite().all() for x in runner.model.state_dict().values())
    resumed = train(digits_config(digits), tmp_path, resume=True)
    assert_same(resumed, weights(trained / 'epoch_3.pth'))


def test_the_largest_activation_is_named(digits, tmp_path):
    runner = make_runner(digits_config(digits), tmp_path)

    blocks = runner.model.backbone.stages[1].blocks
    blocks[0].ffn.fc1.register_forward_hook(lambda m, x, y: y * 1e7)
    blocks[1].ffn.fc2.register_forward_hook(
        lambda m, x, y: y / 0 if runner.iter == 2 else y)
    with pytest.raises(FloatingPointError) as error:
        runner.train()
    message = str(error.value)
    assert message.startswith('Step 3: loss=nan. The largest activation is ')
    assert 'e+06, of backbone.stages.1.blocks.0.ffn.' in message
    assert 'first that is not finite is of backbone.stages.1.blocks.1.ffn.' in (
        message)


def test_losses_and_states_that_are_no_tensors_are_passed_over(digits, tmp_path):
    runner, hook = make_runner(digits_config(digits), tmp_path), InvalidLossHook()
    model = runner.model.train()
    hook.check(runner, model, (), {}, dict(loss_none=[]))
    hook.before_save_checkpoint(runner, dict(state_dict=dict(extra=dict(a=1))))
    with pytest.raises(FloatingPointError, match='loss_none=0, loss=nan'):
        hook.check(runner, model, (), {}, dict(
            loss_none=[], loss=torch.tensor(torch.nan)))


class NeedsAllRanks(nn.Module):
    """Its forward waits for the other ranks', as with SyncBN."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        x = self.layer(x)
        all_reduce(x.detach().mean(), 'mean')
        return dict(loss=x.mean())


def invalid_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    model = NeedsAllRanks()
    runner = SimpleNamespace(model=model, iter=4, message_hub=MessageHub('invalid'))
    InvalidLossHook().before_train(runner)
    for value in ([0., 0.], [0., torch.nan]):
        try:
            model(torch.full((2, 1), value[rank]))
        except FloatingPointError as error:
            Path(folder, f'{rank}.txt').write_text(str(error))
    leave_process_group()


def test_an_invalid_loss_of_one_rank_stops_all_and_is_named(tmp_path, free_port):
    mp.spawn(invalid_worker, (free_port, str(tmp_path)), nprocs=2)
    assert (tmp_path / '0.txt').read_text().startswith(
        'Step 5: a loss of another rank is invalid')
    message = (tmp_path / '1.txt').read_text()
    assert message.startswith('Step 5: loss=nan.')
    assert 'first that is not finite is of layer' in message


@pytest.mark.parametrize('by_epoch, of_epochs', [
    (True, True), (True, False), (False, False)])
def test_invalid_weights_are_not_saved(by_epoch, of_epochs, digits, tmp_path):
    """With the step at which they are, however steps are counted and saved."""
    class Spoil(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter == 7:
                runner.model.head.fc.weight.data[0, 0] = float('nan')

    config = digits_config(digits, default_hooks__checkpoint=dict(
        type='CheckpointHook', interval=1 if of_epochs else 4, by_epoch=of_epochs))
    if not by_epoch:
        config.train_cfg = dict(by_epoch=False, max_iters=12)
        config.train_dataloader.sampler.type = 'InfiniteSampler'
    runner = make_runner(config, tmp_path)
    runner.register_hook(Spoil())
    with pytest.raises(FloatingPointError, match='Step 8: the weights head.fc.weight'):
        runner.train()
    assert {path.name for path in tmp_path.glob('*.pth*')} == {
        'epoch_1.pth' if of_epochs else 'iter_4.pth'}


def test_deterministic_mode_gives_the_same_weights_twice(digits, tmp_path):
    """With all that is random in training."""
    config = digits_config(
        digits,
        model__backbone__drop_path_rate=0.3,
        model__backbone__dp_loss=dict(),
        train_dataloader__dataset__pipeline=RANDOM_IMAGES,
        train_cfg__max_epochs=2)
    torch.use_deterministic_algorithms(False)
    try:
        runs = [
            train(config, tmp_path / str(i),
                  randomness=dict(seed=seed, deterministic=True))
            for i, seed in enumerate((3, 3, 4))
        ]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert_same(runs[0], runs[1])
    assert not torch.equal(*(run['head.fc.weight'] for run in runs[1:]))


@pytest.mark.parametrize('score_path', ['factored', 'materialised', 'auto'])
@pytest.mark.parametrize('image_scale, score_scale', [(1e4, 1), (1, 1e6)])
def test_float16_stays_finite_with_large_activations(score_path, image_scale,
                                                     score_scale):
    """Scores of tens of thousands; float16 ends at 65504."""
    model = LaViT(ARCH, score_path=score_path, pretrain_img_size=64)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith(('.q.weight', '.kv.weight')):
            parameter.data *= score_scale**0.5
    with autocast('cpu', torch.float16):
        maps = model(torch.randn(1, 3, 64, 64) * image_scale)
    assert all(x.isfinite().all() for x in maps)
    sum(x.float().mean() for x in maps).backward()
    assert all(x.grad.isfinite().all() for x in model.parameters())
