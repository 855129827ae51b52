"""How far the training in a work directory has come, and with which figures."""
import json
import re
from pathlib import Path
from typing import Dict, Mapping, NamedTuple, Optional

from mmengine.config import Config

from .logs import read_scalars


class Run(NamedTuple):
    """A training, as its work directory shows it."""
    done: int  # epochs or iterations, by the last checkpoint
    length: int
    unit: str  # 'epoch' or 'iter'
    figures: Dict[str, float]
    figures_of: int  # epoch or iteration of the validation

    @property
    def complete(self) -> bool:
        return self.done >= self.length

    def __str__(self) -> str:
        if not self.done:
            return 'not yet run'
        text = ('complete' if self.complete else
                f'{self.unit} {self.done} of {self.length}')
        if self.figures_of != self.done:
            text += (f', validated at {self.unit} {self.figures_of}'
                     if self.figures else ', not validated')
        return text


def read_run(config: Config, work_dir: Path, names: Mapping[str, str],
             result: Optional[Path] = None) -> Run:
    """Progress by the last checkpoint, figures by the last validation or test.

    Args:
        config (Config): What is trained.
        work_dir (Path): Where; it need not be there yet. Tests after the training
            are looked for in its folder ``test``.
        names (Mapping[str, str]): The toolbox's name of each figure.
        result (Path): JSON of a test, instead of the logs. Default: None.
    """
    train_cfg = config.train_cfg
    unit, length = (('iter', train_cfg.max_iters) if 'max_iters' in train_cfg else
                    ('epoch', train_cfg.max_epochs))
    last = work_dir / 'last_checkpoint'
    match = last.is_file() and re.search(rf'{unit}_(\d+)\.pth', last.read_text())
    done = int(match[1]) if match else 0
    # A test is of the last checkpoint.
    tests = sorted(work_dir.glob('test/*/*.json')) if result is None else [result]
    lines = [] if result else read_scalars(work_dir)
    lines += [dict(json.loads(path.read_text()), step=done) for path in tests]
    figures, figures_of = {}, 0
    for line in lines:
        found = {figure: line[name] for figure, name in names.items()
                 if name in line}
        if found:
            figures, figures_of = found, line.get('step', 0)
    return Run(done, length, unit, figures, figures_of)
