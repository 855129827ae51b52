"""How far the training in a work directory has come, and with which figures."""
import json
import re
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

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

    @property
    def checkpoint(self) -> str:
        """The name of the last one in the work directory."""
        return f'{self.unit}_{self.done}.pth'

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
    done = last_step(work_dir, unit)
    found = [] if result else select(read_scalars(work_dir), names)
    if not found or found[-1].get('step') != done:
        # Of a test, where the last checkpoint was not validated: it is taken to be of
        # that checkpoint.
        tests = [result] if result else sorted(work_dir.glob('test/*/*.json'))
        found += select([dict(json.loads(path.read_text()), step=done)
                         for path in tests], names)
    figures = dict(found[-1]) if found else {}
    figures_of = figures.pop('step', 0)
    return Run(done, length, unit, figures, figures_of)


def last_step(work_dir: Path, unit: str) -> int:
    """Of the last checkpoint; 0: there is none.

    By the file that names it, or, where a kill left that cut off, by the checkpoints.
    """
    last = work_dir / 'last_checkpoint'
    named = [last.read_text()] if last.is_file() else []
    there = [path.name for path in work_dir.glob(f'{unit}_*.pth')]
    for names in named, there:
        found = re.findall(rf'\b{unit}_(\d+)\.pth\b', ' '.join(names))
        if found:
            return max(map(int, found))
    return 0


def select(lines: Sequence[dict], names: Mapping[str, str]) -> List[dict]:
    """Of each line that has any of the figures those and its step, by our names."""
    found = [{figure: line[name] for figure, name in names.items() if name in line}
             for line in lines]
    return [dict(figures, step=line.get('step', 0))
            for figures, line in zip(found, lines) if figures]
