"""Memory of tensors on a CPU."""
import ctypes
import os

# Of <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD = 64 * 2**20  # bytes that are asked for beyond what is needed


def keep_freed_memory() -> bool:
    """Lets the process keep the memory of freed tensors for the next ones.

    glibc gives large pieces back to the system as soon as they are freed, and gets them
    again page by page: up to a sixth of a training step on large images
    (docs/performance.md). It concerns all memory of the process, which the system gets
    back at its end. Does nothing with another C library, or where the user has set
    one of glibc's ``MALLOC_*_`` variables.

    Returns:
        bool: Whether it is so now.
    """
    libc = ctypes.CDLL(None) if os.name == 'posix' else None
    if not hasattr(libc, 'gnu_get_libc_version') or any(
            name.startswith('MALLOC_') and name.endswith('_') for name in os.environ):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: TOP_PAD}
    return all([libc.mallopt(*setting) for setting in settings.items()])
