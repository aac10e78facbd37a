"""What most drafters share: no taps, no state, nothing learned. A drafter overrides what it needs.

Stability: experimental.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxinfer.cache import Cache
from jaxinfer.decode.types import Proposal, Pytree, Sequence, Verifier, WarpLike
from jaxinfer.errors import ConfigError


def accept_counts(spec: Any, *names: str) -> None:
    """Raise ConfigError where one of these settings of `spec` is below 1."""
    for name in names:
        if getattr(spec, name) < 1:
            raise ConfigError(f"{name}: got {getattr(spec, name)}, accepts 1 or more")


class DrafterBase:
    """The `Drafter` protocol with its defaults: no taps, an empty state, any verifier. A subclass is a frozen dataclass
    with `width`, `propose` and, for trees, `depth`; one whose method is its verifier names it in `verifier`."""

    @property
    def width(self) -> int:
        """N."""
        raise NotImplementedError(type(self).__name__)

    @property
    def depth(self) -> int:
        """D: a chain's is its width."""
        return self.width

    @property
    def taps(self) -> tuple[int, ...]:
        """Inner layers of the target whose hidden states `observe` reads: none."""
        return ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Draft counts below `width` at which the target's forward is compiled too, and run where every row's drafts
        fit: none, unless asked for, since which one runs follows the whole batch (it changes rounding alone)."""
        return ()

    @property
    def verifier(self) -> Verifier | None:
        """The verifier that the method prescribes: any."""
        return None

    def init(self, params: Any, target_params: Any, seq: Sequence, cache: Cache) -> Pytree:
        """No state."""
        return ()

    def prefill(self, params: Any, state: Pytree, chunk: Any, output: Any) -> Pytree:
        """Nothing to learn from a prompt."""
        return state

    def ready(self, params: Any, state: Pytree, seq: Sequence, cache: Cache, *, target_params: Any) -> Pytree:
        """Nothing to prepare once the prompt is in the cache."""
        return state

    def shortened(self, state: Pytree, limit: jax.Array) -> Pytree:
        """The state told to propose no more than the first `limit i32[B]` drafts in the next step, where that saves
        work; the caller drops the others."""
        return state

    def propose(
        self, params: Any, state: Pytree, seq: Sequence, cache: Cache, key: jax.Array, *, target_params: Any,
        warp: WarpLike,
    ) -> tuple[Proposal, Pytree]:  # fmt: skip
        raise NotImplementedError(type(self).__name__)

    def observe(self, params, state, seq, proposal, scored, verdict, n, cache) -> Pytree:
        """Nothing to learn from a step."""
        return state
