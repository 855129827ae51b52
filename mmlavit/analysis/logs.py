"""What mmengine logged in a work directory, for the tools."""
import contextlib
import json
from pathlib import Path
from typing import List


def read_scalars(work_dir: Path) -> List[dict]:
    """The logged lines of all parts of a run, in order of time.

    A training that was resumed has a folder, named by its time, for each part. A
    line that a kill cut off is left out.
    """
    lines = []
    for log in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def read_validation(work_dir: Path, step: int) -> dict:
    """All figures of the last validation of one epoch or iteration.

    Args:
        work_dir (Path): That of the training.
        step (int): Validations are logged by epoch, or by iteration where there
            are no epochs.

    Returns:
        dict: Figures by the toolbox's names; empty if there are none.
    """
    found = [line for line in read_scalars(work_dir)
             if 'loss' not in line and line.get('step') == step]
    return {key: value for key, value in (found[-1] if found else {}).items()
            if key not in ('time', 'data_time', 'step')}
