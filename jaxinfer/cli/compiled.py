"""The persistent compilation cache: a program that was compiled once on this machine is read back the next time.

The command line sets it, never the library: a program that imports jaxinfer has its own.

Stability: internal.
"""

import logging
import os
import platform
from pathlib import Path


def cache_directory() -> Path:
    """JAX_COMPILATION_CACHE_DIR where that is set, else a folder of ours in the user's cache directory."""
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if own:
        return Path(own)
    if platform.system() == "Darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "jaxinfer" / "compiled"


def use_cache() -> None:
    """Make jax keep compiled programs. A directory that cannot be written costs the cache, not the run."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return  # jax is told already, thresholds and all
    import jax

    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Small programs too: a decode step of a small model compiles in half a second, and a run has several of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def announce() -> None:
    """Show the library's notes, such as what is being compiled, one line each on stderr."""
    logger = logging.getLogger("jaxinfer")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("jaxinfer: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
