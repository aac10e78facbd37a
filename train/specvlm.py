"""SpecVLM's online distillation: an EAGLE head on the target's logits and features, which each update makes anew.

Huang et al. 2025 (arXiv:2509.11815). The frozen target runs on the batch in every update and nothing is stored; the
loss is 0.1 times the cross-entropy of the head's law against the target's, and the smooth L1 between the head's
features and the target's last ones. Their visual compressor is for image tokens and has no part here.

Guarantee: a different model (the head; what is decoded with it keeps its own guarantee). State: none beyond the loop's.
Paper's defaults: AdamW with betas 0.9 and 0.95, no weight decay, no warm-up, a rate of 8e-5 (7B) or 5e-5 (13B), batches
of 128 samples, one epoch; up to five epochs kept raising the length that is accepted.

Departures: KL in place of cross-entropy, which has the same gradient and is 0 at the end; the head is
`jaxinfer.models.heads.eagle`, which says where it departs from EAGLE; features are the target's after its last norm.

Stability: experimental.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optax

from jaxinfer.errors import ConfigError
from jaxinfer.models.heads.eagle import EagleHead
from jaxinfer.train import heads, loop

RATE = 8e-5
LOSSES = heads.Losses(distill=1.0, features=1.0, rounds=1, logits=0.1)


def adamw(schedule: optax.Schedule) -> optax.GradientTransformation:
    """The paper's optimiser."""
    return optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.0)


def recipe(
    step: Any,
    target_params: Any,
    head: heads.Head,
    stream: Callable[[int], Any],
    *,
    steps: int,
    rate: float = RATE,
    held_out: Any = None,
    identity: Mapping[str, Any] | None = None,
) -> loop.Recipe:
    """The recipe of `heads.recipe` with the paper's losses, optimiser and constant rate.

    ConfigError for a head that does not predict the target's last features: another kind, or EAGLE-3's inner `layers`.
    """
    if not isinstance(head, EagleHead) or head.layers:
        got = "an EAGLE head of inner layers" if isinstance(head, EagleHead) else f"a {head.kind} head"
        raise ConfigError(f"head: got {got}, SpecVLM's objective accepts eagle without layers")
    own = {"objective": "specvlm", **(identity or {})}
    return heads.recipe(
        step, target_params, head, stream, steps=steps, rate=rate, losses=LOSSES, optimizer=adamw,
        schedule=optax.constant_schedule(rate), held_out=held_out, identity=own,
    )  # fmt: skip
