"""The scans, and the data sets that are made of them."""
import json
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest

from builders import run_tool
from mmlavit.analysis.digits import make_once, split_digits


def test_digits_of_the_validation_set_are_held_out():
    scans = split_digits(np.random.default_rng(0))
    train, val = ({scan.tobytes() for scan in scans[split][0]}
                  for split in ('train', 'val'))
    assert len(train) + len(val) == 1797
    assert not train & val
    assert set(scans['val'][1]) == set(range(10))


def normal(scan: np.ndarray) -> np.ndarray:
    """What is on a scan, in one size."""
    rows, columns = (np.flatnonzero((scan > .4).any(axis)) for axis in (1, 0))
    scan = scan[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    return cv2.resize(scan.astype(np.float32), (12, 12)).ravel()


def digit_of_the_bars_colour(image: np.ndarray, scans: np.ndarray,
                             labels: np.ndarray) -> int:
    """What a reader of the image (64, 64, 3), BGR, would say."""
    bars = [image[:4], image[-4:], image[:, :4], image[:, -4:]]
    bar = max((bar.reshape(-1, 3).mean(0) for bar in bars), key=np.ptp)
    inside = image[4:-4, 4:-4].astype(float)
    like = inside @ bar / np.linalg.norm(inside, axis=2) / np.linalg.norm(bar)
    found = (like > .97) & (np.ptp(inside, axis=2) > 90)
    halves = [slice(0, 28), slice(28, None)]
    cell = max(((y, x) for y in halves for x in halves), key=lambda c: found[c].sum())
    rows, columns = (np.flatnonzero(found[cell].any(axis)) for axis in (1, 0))
    digit = found[cell][rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]

    distances = [np.abs(normal(digit) - scan).sum() for scan in scans]
    return labels[np.argmin(distances)]


def test_the_class_is_the_digit_of_the_bars_colour(tmp_path):
    out = tmp_path / 'cued'
    command = 'make_cued_digits', out, '--train', 12, '--val', 40
    assert run_tool(*command).returncode == 0
    assert len(list(out.glob('train/*/*.png'))) == 12
    scans, labels = split_digits(np.random.default_rng(0))['val']
    scans = [normal(scan) for scan in scans]
    files = list(out.glob('val/*/*.png'))
    right = sum(digit_of_the_bars_colour(cv2.imread(str(file)), scans, labels)
                == int(file.parent.name) for file in files)
    assert len(files) == 40 and right >= 34  # small digits are hard to read
    assert 'already there' in run_tool(*command).stdout
    assert json.loads((out / 'dataset.json').read_text())['size'] == 64


def test_a_folder_with_a_file_of_the_stamps_name_is_left_alone(tmp_path):
    """Others call a file dataset.json too."""
    for text in '{"name": "Task01"}', '[1]', 'no JSON':
        (tmp_path / 'dataset.json').write_text(text)
        (tmp_path / 'image').write_text('x')
        with pytest.raises(SystemExit, match='holds something else'):
            make_once(Namespace(out=tmp_path, train=1, val=1), __file__, Path.mkdir)
        assert (tmp_path / 'image').read_text() == 'x'


def test_what_another_process_made_meanwhile_stays(tmp_path):
    args = Namespace(out=tmp_path / 'data', train=1, val=1)

    def write(folder, by='the other'):
        (folder / 'image').write_text(by)

    def write_late(folder):
        make_once(args, __file__, write)
        write(folder, 'this')

    make_once(args, __file__, write_late)
    assert (tmp_path / 'data/image').read_text() == 'the other'
    assert list(tmp_path.iterdir()) == [tmp_path / 'data']
