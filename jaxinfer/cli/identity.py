"""What a batch job's answers depend on besides its rows: the same for every worker that may share the job.

Stability: internal.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.cli.job import Asked, Plan

SAMPLES, SAMPLE = 256, 4096


def fingerprint(asked: Asked, plan: Plan) -> dict[str, Any]:
    """As JSON values. Paths are left out, since workers on several machines may have several."""
    import jax

    import jaxinfer

    return {
        "model": digest(plan.directory),
        "draft_model": None if plan.draft_directory is None else digest(plan.draft_directory),
        "adapter": None if asked.adapter is None else digest(Path(asked.adapter)),
        "drafter": asked.drafter,
        "weights": asked.weights,
        "dtype": plan.step.dtype,
        "cache": asked.cache,
        "mesh": asked.mesh,
        "batch_size": asked.batch_size,
        "max_length": plan.step.config.max_length,
        "device": jax.local_devices()[0].device_kind,
        "versions": {"jaxinfer": jaxinfer.__version__, "jax": jax.__version__, "jaxlib": version("jaxlib")},
    }


def digest(directory: Path) -> str:
    """Of a checkpoint: all of the small files, and evenly spaced samples of the weights with their length.

    Other weights differ nearly everywhere, so samples tell them apart without reading a large model twice.
    """
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".json", ".jinja", ".safetensors") or not path.is_file():
            continue
        length = path.stat().st_size
        state.update(f"{path.name} {length}\n".encode())
        with path.open("rb") as file:
            if path.suffix != ".safetensors" or length <= SAMPLES * SAMPLE:
                state.update(file.read())
                continue
            for i in range(SAMPLES):
                file.seek(i * (length - SAMPLE) // (SAMPLES - 1))
                state.update(file.read(SAMPLE))
    return state.hexdigest()
