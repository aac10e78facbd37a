"""Which form every operation and kernel takes on this machine, and why not another: a part of `jaxinfer doctor`.

Stability: internal.
"""

import importlib
from typing import Any

# The forms of each kernel, forward where it has both directions; a test compares this with the folders.
KERNELS = {
    "flash attention": "attention.flash.api:FORWARD",
    "block-sparse attention": "attention.block_sparse.api:FORWARD",
    "decode attention": "attention.decode.api:FORMS",
    "shared-prefix attention": "attention.shared_prefix.api:FORMS",
    "lightning attention": "linear.lightning.api:FORWARD",
    "gated linear attention": "linear.gla.api:FORWARD",
    "dense product": "matmul.dense.api:FORMS",
    "low-bit product": "matmul.lowbit.api:FORMS",
    "8-bit product": "matmul.acts8.api:FORMS",
    "softmax": "softmax.api:FORWARD",
    "fft convolution": "fftconv.api:FORWARD",
}


def forms() -> list[dict[str, Any]]:
    """One entry an operation: `op`, its `form` here, `why`, and `others`: form -> why not that one."""
    import jax

    backend = jax.default_backend()
    platform = {"gpu": "cuda"}.get(backend, backend)
    found = [
        {
            "op": "attend",
            "form": "XLA, one softmax over all segments",
            "why": "what caches and models use",
            "others": {},
        },
        {"op": "commit", "form": "XLA scatter per row", "why": "keeps a sharded batch where it is", "others": {}},
        {"op": "ragged_dot", "form": "jax.lax.ragged_dot", "why": "experts", "others": {}},
    ]
    for op, where in KERNELS.items():
        module, _, name = where.partition(":")
        table = getattr(importlib.import_module(f"jaxinfer.pallas_kernels.{module}"), name)
        found.append({"op": op, **_choice(table, platform)})
    return found


def _choice(table: Any, platform: str) -> dict[str, Any]:
    """The forms that may run on `platform` in their order; a form for some shapes only is followed by the next one."""
    from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu_refuses

    usable, others = [], {}
    for form in table:
        if not form.automatic:
            others[form.name] = "the oracle of the tests; by name only"
        elif form.platform not in (None, platform):
            reason = mosaic_gpu_refuses() if form.platform == "cuda" else None
            others[form.name] = f"code for {form.platform}" + (f"; {reason}" if reason else "")
        elif form.platform == "cuda" and mosaic_gpu_refuses():
            others[form.name] = mosaic_gpu_refuses()
        else:
            usable.append(form)
    special = [form.name for form in usable if form.platform is not None]
    why = f"code for {platform}, where it serves the shape" if special else "XLA, on any platform"
    return {"form": ", else ".join(form.name for form in usable), "why": why, "others": others}
