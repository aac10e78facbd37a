"""What most drafters share: no taps, no state, nothing learned. A drafter overrides what it needs.

Stability: experimental.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    """The `Drafter` protocol with its defaults: no taps and an empty state, and any verifier. A subclass is a frozen
    dataclass that has `width`, `depth` and `propose`; one whose method is its verifier names it in `verifier`."""

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
    def takes_source(self) -> bool:
        """Whether `draft_params` may be an `aggressive.Source`, which the host layer makes of what rows give: no."""
        return False

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

    def idle(self, params: Any, state: Pytree, seq: Sequence) -> jax.Array | None:
        """Rows bool[B] that will draft nothing in the next step; None: not known, so that `propose` is always asked.
        A drafter that tells must take steps in `observe` that `propose` did not see."""
        return None

    def propose(
        self, params: Any, state: Pytree, seq: Sequence, cache: Cache, key: jax.Array, *, target_params: Any,
        warp: WarpLike,
    ) -> tuple[Proposal, Pytree]:  # fmt: skip
        raise NotImplementedError(type(self).__name__)

    def observe(self, params, state, seq, proposal, scored, verdict, n, cache) -> Pytree:
        """Nothing to learn from a step."""
        return state


class ChainDrafter(DrafterBase):
    """A drafter whose proposals are chains: its depth is its width."""

    # No property at run time: a dataclass takes an inherited one for the default of its own field of that name.
    if TYPE_CHECKING:

        @property
        def width(self) -> int: ...

    @property
    def depth(self) -> int:
        """D."""
        return self.width
