"""The cases of scripts/check_gpu.py, a module a family of kernels; each has `cases(seed)`, a generator of `GpuCase`."""
