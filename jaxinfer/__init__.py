"""jaxinfer: published methods that make generative models fast, as pure functions over shared contracts, in JAX.

Importing the package imports nothing else: `load` and the exceptions are fetched when they are first read, so that
`import jaxinfer.pallas_kernels` brings in jax alone.

Stability: stable.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_LAZY = {
    "CheckpointError": "jaxinfer.errors",
    "ConfigError": "jaxinfer.errors",
    "InputError": "jaxinfer.errors",
    "JaxinferError": "jaxinfer.errors",
    "JobError": "jaxinfer.errors",
    "load": "jaxinfer.decode.language_model",
}

__all__ = ["CheckpointError", "ConfigError", "InputError", "JaxinferError", "JobError", "__version__", "load"]

if TYPE_CHECKING:
    from jaxinfer.decode.language_model import load
    from jaxinfer.errors import CheckpointError, ConfigError, InputError, JaxinferError, JobError
else:

    def __getattr__(name: str):
        if name not in _LAZY:
            raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}; its public names are {__all__}")
        return getattr(importlib.import_module(_LAZY[name]), name)

    def __dir__():
        return sorted({*globals(), *__all__})
