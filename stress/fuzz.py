"""Feeds mutated files from outside to what reads them.

    python stress/fuzz.py DIR [--checkpoints 2000] [--annotations 200] [--masks 200]

Checkpoints (flipped bits, truncations, spliced pickles, zip tricks) go to a LaViT's
``init_cfg``, annotation files and masks to ``check_data``. Each case runs under a
limit of memory and of time, watched for code that it runs. Allowed are a correct load
and an error that names the file (of data: a finding). Prints how often each
mutation ended how, and every failure with its number, by which ``--only`` repeats it;
a case depends on ``--seed`` and its number alone. Not part of the quick suite.
"""
import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import pickle
import pickletools
import random
import resource
import signal
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Callable, Dict, Tuple

import torch

ROOT = Path(__file__).parents[1]
SECONDS, MIB = 20, 1024  # a case may take, beside what the process has
TINY = dict(embed_dims=(4, 8), depths=(1, 1), num_heads=(1, 1), num_va_layers=(1, 0),
            mlp_ratios=(1, 1), strides=(4, 2), patch_sizes=(7, 3))
MODEL = dict(arch=TINY, sr_ratios=(8, 4), out_indices=(1, ), pretrain_img_size=32)
Mutation = Callable[[random.Random, bytes], bytes]


# Any bytes ------------------------------------------------------------------
def flip_bits(rng: random.Random, data: bytes) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[:rng.randrange(len(data))]


def move_bytes(rng: random.Random, data: bytes) -> bytes:
    """A piece of the file, or noise, in place of another or between."""
    start, to = rng.randrange(len(data)), rng.randrange(len(data))
    piece = rng.choice((data[start:start + rng.randrange(1, 200)],
                        rng.randbytes(rng.randrange(1, 200))))
    return data[:to] + piece + data[to + rng.choice((0, len(piece))):]


# Zip ------------------------------------------------------------------------
def read_zip(data: bytes) -> Dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def write_zip(entries, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, 'w', compression) as file:
        warnings.simplefilter('ignore')  # of duplicates
        for name, content in entries:
            file.writestr(name, content)
    return out.getvalue()


@lru_cache
def bomb(entries: tuple, big: str) -> bytes:
    """One entry of 2 GiB, in 2 MiB."""
    out = io.BytesIO(write_zip(entry for entry in entries if entry[0] != big))
    with zipfile.ZipFile(out, 'a', zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open(big, 'w', force_zip64=True) as entry:
            for _ in range(2048):
                entry.write(bytes(2**20))
    return out.getvalue()


def change_zip(rng: random.Random, data: bytes) -> bytes:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return flip_bits(rng, data)
    entries = list(read_zip(data).items())
    i = rng.randrange(len(entries))
    name, content = entries[i]
    kind = rng.randrange(10)
    if kind == 0:  # duplicate, of other content
        entries.append((name, move_bytes(rng, content or b'x')))
    elif kind == 1:
        del entries[i]
    elif kind == 2:  # another path
        entries[i] = rng.choice(('../' * 5 + 'tmp/x', '/tmp/x', name + '\0', ' ',
                                 name.upper(), 'a' * 60000)), content
    elif kind == 3:  # as TorchScript has
        entries.append((name.split('/')[0] + '/constants.pkl', content))
    elif kind == 4:
        entries += [(f'{name}{j}', b'') for j in range(5000)]
    elif kind == 5:
        entries[i] = name, content * rng.choice((0, 2, 1000))
    elif kind == 6:
        return write_zip(entries, zipfile.ZIP_DEFLATED)
    elif kind == 7:
        return bomb(tuple(entries), rng.choice(
            [name for name, _ in entries if name.endswith(('/data.pkl', '/data/0'))]))
    elif kind == 8:  # sizes that are none, here and in the directory
        changed = bytearray(write_zip(entries))
        for mark, place in ((b'PK\1\2', 20), (b'PK\3\4', 18)):
            at = changed.find(mark, rng.randrange(len(changed)))
            if at >= 0:
                size = rng.choice((0xffffffff, 0x7fffffff, 0, rng.randrange(2**32)))
                changed[at + place:at + place + 8] = size.to_bytes(4, 'little') * 2
        return bytes(changed)
    else:
        entries.append((rng.choice(entries)[0] + '/', b''))
    return write_zip(entries)


# Pickles --------------------------------------------------------------------
def call(function: str, *args) -> bytes:
    """Opcodes that call a function and leave its result."""
    module, name = function.rsplit('.', 1)
    return (f'c{module}\n{name}\n'.encode() + b'(' +
            b''.join(pickle.dumps(arg, 2)[2:-1] for arg in args) + b'tR')


def hostile(rng: random.Random, ran: str) -> bytes:
    """Opcodes that would run code, or take much memory or time."""
    big = rng.choice((10**7, 10**10, 10**12, 2**62, -1))
    return rng.choice((
        call('os.mkdir', ran), call('posix.mkdir', ran), call('nt.mkdir', ran),
        call('os.system', f'mkdir {ran}'), call('subprocess.Popen', ['mkdir', ran]),
        call('builtins.eval', f'__import__("os").mkdir({ran!r})'),
        call('__builtin__.exec', f'import os; os.mkdir({ran!r})'),
        call('builtins.__import__', 'antigravity'), call('builtins.open', ran, 'w'),
        call('torch.hub.load', 'owner/name', 'model'), call('torch.load', ran),
        call('torch.utils.data._utils.worker.os.mkdir', ran),
        call('functools.partial', 1), call('operator.attrgetter', 'x'),
        b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
        b'(X\x0a\x00\x00\x00__globals__d' + b'b.',
        b'cbuiltins\ngetattr\n(cmmengine.logging.history_buffer\nHistoryBuffer\n'
        b'X\x08\x00\x00\x00__init__tR',
        call('builtins.bytearray', big), call('numpy.dtype', f'V{big}'),
        b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n('
        + pickle.dumps(big, 2)[2:-1] + b't' + pickle.dumps(b'd', 2)[2:-1] + b'tR',
        b'ctorch\nFloatTensor\n(' + pickle.dumps(big, 2)[2:-1] + b'tR',
        b'ctorch\nSize\n(' + pickle.dumps(big, 2)[2:-1] + b'tR',
        call('collections.Counter', 'a' * 10000),
        b'(' * 100_000, b']' * 100_000 + b'a' * 99_999, b')' + b'\x85' * 100_000,
        b'](' + b'2' * 100_000 + b'e', b'X\xff\xff\xff\xff', b'\x8b\xff\xff\xff\x7f',
        b'r\xff\xff\xff\x7f', b'h\x99', b'\x80\xff', b'0' * 50, b'.', b'Q',
        rng.randbytes(rng.randrange(1, 30))))


def splice(rng: random.Random, data: bytes, ran: str) -> bytes:
    """Changes a pickle between two opcodes, or the argument of one."""
    try:
        places = [place for _, _, place in pickletools.genops(data)]
    except Exception:  # the old format holds several
        places = list(range(2, len(data)))
    at = rng.choice(places[1:])
    kind = rng.randrange(5)
    if kind == 0:  # called, its result dropped
        return data[:at] + hostile(rng, ran) + b'0' + data[at:]
    if kind == 1:
        return data[:at] + hostile(rng, ran) + data[at:]
    if kind == 2:  # in place of all that follows
        return data[:at] + hostile(rng, ran) + b'.'
    if kind == 3:  # opcodes in another order
        others = sorted(rng.sample(places, 3))
        a, b, c = others
        return data[:a] + data[b:c] + data[a:b] + data[c:]
    codes = [place for place in places if data[place:place + 1] in b'KMJ\x8a']
    at = rng.choice(codes or places)  # another number
    return data[:at] + pickle.dumps(rng.choice(
        (-1, 0, 1, 255, 2**16, 2**31 - 1, 2**40, 2**62, 10**30)), 2)[2:-1] + data[
            at + dict(K=2, M=3, J=5).get(chr(data[at]), 1):]


def change_pickle(rng: random.Random, data: bytes, ran: str) -> bytes:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return splice(rng, data, ran)
    return write_zip((name, splice(rng, content, ran) if name.endswith('/data.pkl')
                      else content) for name, content in read_zip(data).items())


def change_values(rng: random.Random, checkpoint: dict) -> dict:
    """A checkpoint that torch wrote, of other things than weights."""
    checkpoint = copy.deepcopy(checkpoint)
    weights = checkpoint['state_dict']
    for name in rng.sample(list(weights), 3):
        weights[name] = rng.choice((
            None, 1, 'text', [], {}, torch.tensor(1.), torch.zeros(0), float('nan'),
            torch.zeros(1).expand(2**20, 2**20), torch.zeros(3, dtype=torch.int8),
            torch.full_like(weights[name], torch.nan), torch.sparse_coo_tensor(
                torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (4, )),
            weights[name].double(), weights[name].to(torch.complex64),
            torch.empty(weights[name].shape, device='meta')))
    if rng.random() < 0.3:
        key = rng.choice((0, None, '', 'a' * 10**6, (1, 2), 'state_dict'))
        rng.choice((checkpoint, weights))[key] = rng.choice((None, {}, weights, 1))
    return checkpoint


# Data -----------------------------------------------------------------------
def change_json(rng: random.Random, data: bytes) -> bytes:
    """Other values in a few places, or other bytes."""
    if rng.random() < 0.2:
        return rng.choice((flip_bits, truncate, move_bytes))(rng, data)
    root = json.loads(data)
    images = copy.deepcopy(root['images'][:1])
    for _ in range(rng.choice((1, 1, 3))):
        place, key = None, None
        value = root
        while isinstance(value, (dict, list)) and value and (
                place is None or rng.random() < 0.8):
            place = value
            key = rng.choice(list(value) if isinstance(value, dict)
                             else range(len(value)))
            value = value[key]
        if place is None:
            continue
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = copy.deepcopy(rng.choice((
                None, True, -1, 0, 1e308, float('nan'), float('inf'), 10**30, '', 'x',
                '../' * 20 + 'etc/passwd', '\0', 'a' * 10**5, [], {}, [[]], [1e300] * 4,
                ['a', 'b'], [float('nan')] * 4, [-5, -5, 1, 1], images)))
    return b'[' * 10**5 if rng.random() < 0.01 else json.dumps(root).encode()


def change_png(rng: random.Random, data: bytes) -> bytes:
    """Other bytes, or a header of another size, with its check sum."""
    if rng.random() < 0.6:
        return rng.choice((flip_bits, truncate, move_bytes))(rng, data)
    import zlib
    header = bytearray(data[12:29])
    sizes = (0, 1, 7, 1000, 60000, 2**31 - 1, 2**32 - 1)
    for at in (4, 8):
        if rng.random() < 0.7:
            header[at:at + 4] = rng.choice(sizes).to_bytes(4, 'big')
    if rng.random() < 0.3:  # depth, colours, ...
        header[rng.randrange(12, 17)] = rng.randrange(256)
    return data[:12] + bytes(header) + zlib.crc32(header).to_bytes(4, 'big') + data[33:]


# Cases ----------------------------------------------------------------------
class Checkpoints:
    """Mutated checkpoints, taken as pre-trained weights."""

    def __init__(self, folder: Path, seed: int) -> None:
        import numpy as np
        from mmengine.logging import HistoryBuffer

        import mmlavit
        torch.manual_seed(0)
        weights = mmlavit.LaViT(**MODEL).state_dict()
        history = HistoryBuffer()
        history.update(1.)
        self.good = dict(
            meta=dict(epoch=1, seed=np.int64(3), dataset_meta=dict(classes=('a', ))),
            message_hub=dict(log_scalars={'train/loss': history}),
            state_dict=weights)
        self.seed, self.path = seed, folder / 'fuzzed.pth'
        self.ran = str(folder / 'ran')
        self.files = [self.saved(self.good), self.saved(dict(weights)),
                      self.saved(self.good, _use_new_zipfile_serialization=False)]

    def saved(self, checkpoint: dict, **options) -> bytes:
        out = io.BytesIO()
        torch.save(checkpoint, out, **options)
        return out.getvalue()

    def write(self, i: int) -> str:
        rng = random.Random(f'{self.seed} checkpoint {i}')
        data = rng.choice(self.files)
        kind = rng.choice(('bits', 'truncated', 'moved', 'zip', 'zip', 'pickle',
                           'pickle', 'pickle', 'values'))
        if kind == 'values':
            data = self.saved(change_values(rng, self.good))
        elif kind == 'pickle':
            data = change_pickle(rng, data, self.ran)
        else:
            data = dict(bits=flip_bits, truncated=truncate, moved=move_bytes,
                        zip=change_zip)[kind](rng, data)
        self.path.write_bytes(data)
        return kind

    def use(self) -> str:
        import mmlavit
        model = mmlavit.LaViT(**MODEL, init_cfg=dict(
            type='Pretrained', checkpoint=str(self.path)))
        try:
            model.init_weights()
        except ValueError as error:
            if str(self.path) not in str(error):
                raise
            return 'refused'
        assert not os.path.exists(self.ran), 'code was run'
        own = model.state_dict()
        assert all(own[name].shape == x.shape and own[name].is_floating_point()
                   for name, x in self.good['state_dict'].items())
        return 'loaded'


class Data:
    """Mutated files of a data set, given to ``check_data``."""

    def __init__(self, folder: Path, seed: int, which: str) -> None:
        from mmengine.config import Config
        data = folder / 'digits'
        if not data.exists():
            subprocess.run([sys.executable, ROOT / 'tools/make_digits.py', data,
                            '--train', '2', '--val', '1'], check=True)
        loader = dict(batch_size=1, num_workers=0)
        if which == 'annotations':
            self.path = data / 'annotations/val.json'
            dataset = dict(
                type='CocoDataset', ann_file='annotations/val.json',
                data_prefix=dict(img='images/val/'), data_root=f'{data}/',
                metainfo=dict(classes=tuple('0123456789')), pipeline=[
                    dict(type='LoadImageFromFile'),
                    dict(type='LoadAnnotations', with_bbox=True),
                    dict(type='PackDetInputs')])
            scope, self.change = 'mmdet', change_json
        else:
            self.path = sorted((data / 'masks/val').glob('*.png'))[0]
            dataset = dict(
                type='BaseSegDataset', data_root=f'{data}/', img_suffix='.png',
                data_prefix=dict(img_path='images/val', seg_map_path='masks/val'),
                metainfo=dict(classes=tuple('0123456789x')), pipeline=[
                    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
                    dict(type='PackSegInputs')])
            scope, self.change = 'mmseg', change_png
        self.config = Config(dict(default_scope=scope, model=dict(),
                                  val_dataloader=dict(loader, dataset=dataset)))
        good = self.path.with_suffix('.good')
        if not good.exists():
            good.write_bytes(self.path.read_bytes())
        self.good = good.read_bytes()
        self.seed, self.which, self.ran = seed, which, str(folder / 'ran')

    def write(self, i: int) -> str:
        rng = random.Random(f'{self.seed} {self.which} {i}')
        self.path.write_bytes(self.change(rng, self.good))
        return self.which

    def use(self) -> str:
        from mmlavit.analysis.dataset_checks import check_config
        (_, report), = check_config(self.config, ['val'], 0)
        report.describe(3)
        wrong = any(kind.startswith('ERROR') for kind in report.kinds())
        return 'error found' if wrong else 'no error'


# Limits ---------------------------------------------------------------------
WATCHED = ('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'os.mkdir', 'os.remove',
           'os.rename', 'os.rmdir', 'subprocess', 'shutil', 'socket.connect', 'ctypes',
           'webbrowser')


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run_cases(cases, numbers: list, pipe) -> None:
    """In a process of its own; a case that ends it is told by its silence."""
    watch = dict(on=False, seen=[])

    def audit(event: str, args: tuple) -> None:
        writes = (event == 'open' and isinstance(args[1], str)
                  and set(args[1]) & set('wax+'))
        if watch['on'] and (event.startswith(WATCHED) or writes):
            watch['seen'].append(f'{event} {args}')

    sys.dont_write_bytecode = True
    sys.addaudithook(audit)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    cases.write(0)
    with contextlib.suppress(Exception):
        cases.use()  # imports what it needs
    size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MIB * 2**20, ) * 2)
    peak = peak_mib()
    for i in numbers:
        kind = cases.write(i)
        pipe.send((i, kind, None, 0))
        watch.update(on=True, seen=[])
        signal.alarm(SECONDS)
        try:
            outcome = cases.use()
        except BaseException as error:
            outcome = f'FAILED: {type(error).__name__}: {str(error)[:300]}'
        signal.alarm(0)
        watch['on'] = False
        if watch['seen'] or os.path.exists(cases.ran):
            outcome = f'FAILED: ran {watch["seen"][:3]}'
            with contextlib.suppress(OSError):
                os.rmdir(cases.ran)
        before, peak = peak, peak_mib()
        if peak - before > MIB / 2:
            outcome = f'FAILED: took {peak - before} MiB, {outcome}'
        pipe.send((i, kind, outcome, peak))


def fuzz(cases, numbers: list) -> Tuple[Counter, int]:
    """Runs the cases in children, a new one after each that ends early."""
    context = multiprocessing.get_context('fork')
    counts, peak, numbers = Counter(), 0, list(numbers)
    while numbers:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=run_cases, args=(cases, numbers, theirs))
        child.start()
        theirs.close()
        kind = outcome = None
        with contextlib.suppress(EOFError):
            while True:
                i, kind, outcome, most = ours.recv()
                if outcome is None:
                    continue
                peak = max(peak, most)
                counts[kind, outcome.split(':')[0]] += 1
                if outcome.startswith('FAILED'):
                    print(f'{i} ({kind}): {outcome}', flush=True)
                numbers.remove(i)
        child.join()
        if numbers:
            if kind is None:
                raise SystemExit(f'ended before the first case: {child.exitcode}')
            print(f'{numbers[0]} ({kind}): FAILED: process ended, {child.exitcode}',
                  flush=True)
            counts[kind, 'FAILED'] += 1
            del numbers[0]
    return counts, peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dir', type=Path, help='folder for the files; e.g. /tmp/fuzz')
    for name, number in dict(checkpoints=2000, annotations=200, masks=200).items():
        parser.add_argument(f'--{name}', type=int, default=number, metavar='N',
                            help=f'cases; default: %(default)s; e.g. --{name} 100')
    parser.add_argument('--seed', type=int, default=0,
                        help='of the mutations; default: %(default)s; e.g. --seed 1')
    parser.add_argument('--only', type=int, metavar='N',
                        help='the number of one case to repeat; default: all; '
                        'e.g. --only 12')
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in ('checkpoints', 'annotations', 'masks'):
        number = getattr(args, name)
        if not number:
            continue
        cases = (Checkpoints(args.dir, args.seed) if name == 'checkpoints'
                 else Data(args.dir, args.seed, name))
        counts, peak = fuzz(cases, range(number) if args.only is None else [args.only])
        print(f'{name}, seed {args.seed}, {sum(counts.values())} cases, '
              f'largest process {peak} MiB:')
        for (kind, outcome), times in sorted(counts.items()):
            print(f'  {kind:<12} {outcome:<12} {times:5}')
            failed += times * (outcome == 'FAILED')
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
