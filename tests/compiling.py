"""How tests compile: most of the suite's time is XLA's on programs that run once, so it is asked for quick code.

`tests/conftest.py` sets FLAGS for all tests, which halves their time. What is measured of a compiled program, such as
its memory, is compiled with DEFAULTS: `lowered.compile(compiler_options=DEFAULTS)`.
"""

import jax

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
DEFAULTS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
if jax.__version_info__ < (0, 11):  # later ones end the process for a flag that they do not know
    QUICK["xla_cpu_use_fusion_emitters"] = False
    DEFAULTS["xla_cpu_use_fusion_emitters"] = True
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
