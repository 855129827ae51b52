"""Memory of freed tensors."""
import os
import platform
import subprocess
import sys

import pytest

# Pages that the system hands out while a tensor is made ten times over.
CODE = '''
import resource, torch
from mmlavit.utils.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before, said = faults(), keep_freed_memory()
faults()  # the process grows once
print(before, said, faults())
'''
PAGES = 10 * 2**26 // os.sysconf('SC_PAGE_SIZE')  # of ten such tensors


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='it is for glibc alone')
@pytest.mark.parametrize('env, kept', [({}, True), (dict(MALLOC_ARENA_MAX_='2'), False)])
def test_freed_memory_is_kept_unless_the_user_chose(env, kept):
    # Large pages, if the system uses them, are few faults, and far more than none.
    env = {**{k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}, **env}
    out = subprocess.run([sys.executable, '-c', CODE], text=True, check=True,
                         capture_output=True, env=env).stdout.split()
    before, said, after = int(out[0]), out[1] == 'True', int(out[2])
    assert said == kept
    assert before > PAGES / 1000
    assert after < PAGES / 10000 if kept else after > PAGES / 1000
