"""The demo's screen, and its choice of threads."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from builders import load_tool

ROOT = Path(__file__).parents[2]


demo = load_tool('demo')


@pytest.fixture
def steps(tmp_path):
    return demo.Steps(tmp_path / 'demo.log')


@pytest.mark.parametrize('verbose', [False, True])
def test_the_log_has_everything_and_the_screen_if_asked(steps, capfd, verbose):
    steps.verbose = verbose
    watched = []
    steps.begin('2/5 A step')
    text = steps.run(
        sys.executable, '-c',
        'import sys; print("to out"); print("to err", file=sys.stderr)',
        watch=lambda: watched.append(1))
    out, err = capfd.readouterr()
    assert text == 'to out\nto err\n'
    assert steps.log.read_text().endswith(text)
    assert '2/5 A step' in out and '2/5 A step' in steps.log.read_text()
    assert err == '' and (text in out) == verbose == (not watched)


def test_a_failing_step_is_named_with_the_end_of_its_log(steps):
    steps.begin('1/5 Before')
    steps.run('echo', 'another step')
    steps.begin('2/5 Broken')
    with pytest.raises(SystemExit) as error:
        steps.run('sh', '-c', 'seq 100 140; echo no such file >&2; exit 3')
    message = str(error.value)
    for part in ('2/5 Broken', 'code 3', 'no such file', '140', str(steps.log)):
        assert part in message
    assert '120' not in message and 'another step' not in message


def test_what_runs_ends_with_the_demo(steps):
    """Else the next one would find the lock taken."""
    def printed() -> list:
        return steps.log.read_text().splitlines()[3:]

    def interrupt() -> None:
        if printed():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.run(sys.executable, '-c',
                  'import os, time; print(os.getpid()); time.sleep(10); print(0)',
                  watch=interrupt)
    pid, = printed()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_the_lock_is_passed_on(steps, tmp_path):
    with open(tmp_path / 'lock', 'w') as lock:
        os.set_inheritable(lock.fileno(), True)
        steps.run(sys.executable, '-c',
                  f'import os; os.write({lock.fileno()}, b"held")')
    assert (tmp_path / 'lock').read_text() == 'held'


def trained(step: int, loss: float) -> dict:
    return dict(loss=loss, step=step, epoch=1, iter=step)


def test_progress_elsewhere_than_in_a_terminal(capsys):
    scalars = [trained(60, 9.)]  # lost: after the last checkpoint
    progress = demo.Progress(lambda: scalars, 100, 50, terminal=False)
    progress()
    for step in range(52, 101, 2):
        scalars.append(trained(step, step / 100))
        if step == 80:
            scalars.append({'coco/bbox_mAP': 0.25, 'step': 1})
        progress()
    progress.close()
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        '    60/100 iterations: loss 0.60', '    70/100 iterations: loss 0.70',
        '    80/100 iterations: loss 0.80, AP 0.250',
        '    90/100 iterations: loss 0.90, AP 0.250',
        '    100/100 iterations: loss 1.00, AP 0.250'
    ]
    assert '\r' not in out and err == ''


def test_progress_in_a_terminal_is_a_bar(capsys):
    scalars = []
    progress = demo.Progress(lambda: scalars, 100, terminal=True)
    scalars += [trained(40, 1.25), {'coco/bbox_mAP': 0.5, 'step': 3}]
    progress()
    progress.close()
    last = capsys.readouterr().out.rstrip().split('\r')[-1]
    for part in ('training:  40%', '40/100', 'loss=1.25', 'AP=0.500'):
        assert part in last


@pytest.mark.parametrize('seconds, best', [({1: 0.3, 8: 0.2}, 8),
                                           ({1: 0.3, 8: 11.}, 1)])
def test_the_faster_number_of_threads_is_taken(
        seconds, best, capsys, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    assert demo.choose_threads(seconds.get, 8) == best
    assert f'{best} of 8: a training step takes' in capsys.readouterr().out


def test_threads_are_not_timed_where_there_is_no_choice(capsys, monkeypatch):
    def measure(threads: int) -> float:
        raise AssertionError

    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    assert demo.choose_threads(measure, 1) == 1
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    assert demo.choose_threads(measure, 8) is None
    assert 'OMP_NUM_THREADS=3' in capsys.readouterr().out


@pytest.mark.parametrize('limit, steps, mean', [(100., 6, 5.), (7., 4, 3.)])
def test_warm_up_is_not_timed_and_slow_machines_take_fewer_steps(
        limit, steps, mean):
    """The steps take 100, 1, 3, 5, 7 and 9 seconds."""
    durations = iter([100, 1, 3, 5, 7, 9])
    now = [0.]

    def step() -> None:
        now.append(now[-1] + next(durations))

    assert load_tool('demo_step_time').mean_time(
        step, 5, limit, lambda: now[-1]) == mean
    assert len(now) == steps + 1


def test_the_bars_length_is_the_trainings(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'CONFIG', ROOT / demo.CONFIG)
    monkeypatch.chdir(tmp_path)
    data = tmp_path / 'data/digits/annotations/train.json'
    data.parent.mkdir(parents=True)
    data.write_text(json.dumps(dict(images=[{}] * 1501)))
    assert demo.iterations_of_epoch({}) == 376
    assert demo.iterations_of_epoch(demo.SHORT) == 6


@pytest.mark.parametrize('named', ['/gone/epoch_2.pth', '', '/gone/epo'])
def test_the_last_checkpoint_is_found_in_a_moved_folder(named, tmp_path):
    """And where a kill cut off the file that names it."""
    for name in ('epoch_1.pth', 'epoch_2.pth', 'epoch_3-9a8b7c6d.pth'):
        (tmp_path / name).touch()
    (tmp_path / 'last_checkpoint').write_text(named)
    run = demo.read_run(tmp_path, {'train_cfg.max_epochs': 4})
    assert (run.done, run.length) == (2, 4)
    assert run.checkpoint == 'epoch_2.pth'


def test_a_run_of_other_code_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('mmlavit/models/a.py', 'configs/c.py', 'tools/make_digits.py'):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('')
    work_dir, kept = tmp_path / 'work', tmp_path / 'work/epoch_1.pth'
    demo.remove_other(work_dir)
    kept.touch()
    demo.remove_other(work_dir)
    assert kept.is_file()
    (tmp_path / 'mmlavit/models/a.py').write_text('changed')
    demo.remove_other(work_dir)
    assert not kept.exists() and work_dir.is_dir()


def test_wrong_options_are_named_before_set_up():
    result = subprocess.run(['bash', 'tools/demo.sh', '--shrot'], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 2
    assert 'usage' in result.stderr and result.stdout == ''
