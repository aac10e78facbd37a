"""The cases of scripts/bench_kernels.py, a module a family of kernels; each has `cases()`, a generator of `Case`."""
