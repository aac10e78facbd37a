"""What the C library does with memory that a program on the CPU frees. Both calls do nothing where it is not glibc.

XLA's CPU programs allocate their temporary arrays anew each time they run, and glibc hands each large one back to the
system: the next run meets zeroed pages again, one fault for every 4 KB. A training step of 90 MB of temporary arrays
spent a fifth of its time so. Nothing here changes a result.

Stability: experimental.
"""

import ctypes

# Of <malloc.h>: mallopt's parameters.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_LARGEST_INT = 2**31 - 1


def keep_freed() -> bool:
    """Has the process keep what it frees, for the next program to use; whether the C library agreed.

    Call it before JAX's first use of a device: a thread that has allocated keeps its own way of doing so. For programs
    that run over and over, as training does; memory then stays at the highest that was needed at once.
    """
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST_INT), (_TOP_PAD, 2**26))
    try:
        library = ctypes.CDLL(None)
        return all([bool(library.mallopt(*setting)) for setting in settings])
    except (AttributeError, OSError, TypeError):
        return False


def give_back() -> None:
    """Gives free memory back to the system now: compiling leaves some hundred megabytes of it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
