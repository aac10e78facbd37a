"""Memory that programs free stays with the process when asked to: no page is faulted in anew."""

import ctypes
import subprocess
import sys

import pytest

from jaxinfer import host_memory

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt"),
]

# Its temporary arrays are of 36 MB: more than the 32 from which glibc always asks the system.
PROGRAM = """
import resource, statistics, sys
from jaxinfer import host_memory
if sys.argv[1] == "keep":
    assert host_memory.keep_freed()
import jax, jax.numpy as jnp
program = jax.jit(lambda x: jnp.flip(jnp.sin(x[:, None] + x) @ x[:, None], 0))
x = jnp.ones(3000)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):  # the heap grows in the first few
    program(x).block_until_ready()
counts = []
for _ in range(7):
    before = faults()
    program(x).block_until_ready()
    counts.append(faults() - before)
print(statistics.median(counts))  # the heap may still grow in one of them
"""


def faults(how):
    out = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return float(out.stdout)


def test_kept_memory_is_not_faulted_in_again():
    returned, kept = faults("return"), faults("keep")
    assert returned > 8000  # 36 MB are 8800 pages: without the call the test sees what it is about
    assert kept < returned / 10


def test_the_c_library_says_whether_it_agreed(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert not host_memory.keep_freed()
    host_memory.give_back()  # nothing to call: no error
