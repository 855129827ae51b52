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
