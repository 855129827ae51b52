"""Time, memory and operators of a step, whatever it does."""
import contextlib
import gc
import itertools
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

Step = Callable[[], object]
# As torch's profiler calls it, and as torch 2.1's did.
DEVICE_TIME = ('self_device_time_total' if hasattr(
    FunctionEventAvg(), 'self_device_time_total') else 'self_cuda_time_total')


class Spread(NamedTuple):
    """Percentiles of what was measured."""
    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread':
        """Of at least two values."""
        low, *_, high = statistics.quantiles(values, n=10, method='inclusive')
        return cls(low, statistics.median(values), high)


def speed_ratio(one: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times as fast the other is, of the rounds' times."""
    return Spread.of([a / b for a, b in zip(one, other)])


def time_in_turn(steps: Dict[str, Step], rounds: int, warmup: int, device: str,
                 title: str = '', quiet: bool = False) -> Dict[str, List[float]]:
    """Seconds of every step in every round.

    The steps take turns, so that a machine that slows down slows all of them.

    Args:
        steps (dict[str, Callable]): What is timed, by name.
        rounds (int): Of all steps that are counted.
        warmup (int): Rounds before, that are not.
        device (str): 'cuda' waits for the GPU before the clock is read.
        title (str): Of the progress bar. Default: none.
        quiet (bool): Without a progress bar. Default: False.
    """
    times = {name: [] for name in steps}
    for i in tqdm(range(warmup + rounds), title,
                  disable=quiet or None):
        for name, step in steps.items():
            synchronise(device)
            begin = time.perf_counter()
            step()
            synchronise(device)
            if i >= warmup:
                times[name].append(time.perf_counter() - begin)
    return times


def synchronise(device: str) -> None:
    """Waits for what the GPU was given."""
    if device == 'cuda':
        torch.cuda.synchronize()


def peak_memory(step: Step, device: str) -> float:
    """What a step needs beside the weights, in MB (1e6 bytes) of tensors."""
    gc.collect()
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # The process's own memory would tell what the other models left.
    with one_cycle(), profile(activities=[ProfilerActivity.CPU],
                              profile_memory=True) as run:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, 'trace.json')
        run.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    events = sorted((event['ts'], event['args']['Bytes'])
                    for event in events if event['name'] == '[memory]')
    return max(itertools.accumulate(n for _, n in events), default=0) / 1e6


def operator_table(step: Step) -> str:
    """Where the time of a step goes, by operator."""
    with one_cycle(), profile() as run:
        step()
    return run.key_averages().table(
        sort_by='self_cpu_time_total', row_limit=12, max_name_column_width=40)


class Kernels(NamedTuple):
    """What the device did in a step."""
    busy_ms: float  # in kernels
    calls: int
    rows: List[dict]  # ``kernel``, ``calls``, ``ms``, ``share``, the longest first


def profile_kernels(step: Step, device: str) -> Kernels:
    """The kernels of a step on a GPU, the operators on a CPU.

    A step whose kernels take much less than it takes itself waits for launches.
    """
    activities = [ProfilerActivity.CPU]
    kind, attribute = DeviceType.CPU, 'self_cpu_time_total'
    if device == 'cuda':
        activities.append(ProfilerActivity.CUDA)
        kind, attribute = DeviceType.CUDA, DEVICE_TIME
    step()
    synchronise(device)
    with one_cycle(), profile(activities=activities) as run:
        step()
        synchronise(device)
    events = [event for event in run.key_averages()
              if event.device_type == kind
              and not getattr(event, 'is_user_annotation', False)]
    busy = sum(getattr(event, attribute) for event in events) / 1e3
    rows = [dict(kernel=event.key, calls=event.count,
                 ms=getattr(event, attribute) / 1e3,
                 share=getattr(event, attribute) / 1e3 / max(busy, 1e-9))
            for event in sorted(events, key=lambda e: -getattr(e, attribute))]
    return Kernels(busy, sum(event.count for event in events), rows)


@contextlib.contextmanager
def one_cycle() -> Iterator[None]:
    """Silences the profiler's warning of the end of a cycle: here is but one."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*Profiler clears events')
        yield
