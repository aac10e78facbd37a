"""`--drafter auto`: another drafter under a `Chooser`, which drafts as far as that pays on this machine.

    auto                                     the draft model's or head's drafts where there is one, else copies
    auto:drafter=token-recycling             another drafter; of its own settings the first follows a colon, the others
    auto:drafter=copyspec:gamma=4+copies=16  a plus sign

What a forward costs is measured when the work begins. A job measures once, and keeps the curves in its manifest: every
worker and every later run then chooses as the first one did.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxinfer.cli import options
from jaxinfer.errors import InputError

if TYPE_CHECKING:
    from jaxinfer.decode.chooser import Chooser
    from jaxinfer.decode.language_model import LanguageModel

WITH_A_MODEL, WITHOUT = "draft", "copyspec"


@dataclasses.dataclass(frozen=True)
class Auto:
    """`drafter`: whose drafts are chosen from, None: see above. `gain`, `together`, `probe`: as for `Chooser`. `step`,
    `head` and `target`: the draft model's Step or the head, where there is one, and the model's Step."""

    drafter: str | None = None
    gain: float = 1.1
    together: bool = False
    probe: int = 64
    step: Any = None
    head: Any = None
    target: Any = None

    def __post_init__(self):
        self.inner  # noqa: B018 - told before anything is loaded

    @property
    def name(self) -> str:
        """How the command line spells the drafter alone."""
        if self.drafter is not None:
            return self.drafter
        return WITH_A_MODEL if self.step is not None else WITHOUT if self.head is None else self.head.kind

    @property
    def inner(self) -> Any:
        """The drafter itself."""
        if self.name.partition(":")[0] == "auto":
            raise InputError("--drafter auto: got drafter=auto; accepted: another drafter")
        parts = {"step": self.step, "head": self.head, "target": self.target}
        return options.DRAFTERS.parse(self.name.replace("+", ","), **parts)

    @property
    def width(self) -> int:
        """The most drafts of a step."""
        return self.inner.width

    @property
    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("gain", "together", "probe")}

    def measured(self, lm: LanguageModel, *, batch: int, capacity: int) -> Chooser:
        """With curves of this machine, now: forwards of `batch` rows of `capacity` tokens."""
        from jaxinfer.decode.chooser import Chooser

        draft = None if lm.draft is None else lm.draft.params
        return Chooser.measured(
            self.inner, lm.step, lm.params, batch=batch, capacity=capacity, draft_params=draft, **self._options
        )

    def with_curves(self, curves: Mapping[str, Any] | None) -> Chooser:
        """With curves that were measured before: what `curves_of` gave."""
        from jaxinfer.decode.chooser import Chooser
        from jaxinfer.measure import LatencyCurve

        if curves is None:
            raise InputError("--drafter auto: got a job without curves; accepted: one that began with auto")

        def curve(values: Mapping[str, Any]) -> LatencyCurve:
            return LatencyCurve(tuple(values["sizes"]), tuple(values["seconds"]))

        draft = None if curves["draft"] is None else curve(curves["draft"])
        return Chooser(self.inner, curve(curves["target"]), draft, **self._options)


def curves_of(chooser: Chooser) -> dict[str, Any]:
    """The curves as JSON values, to the last bit."""
    curves = {"target": chooser.target, "draft": chooser.draft}
    return {
        name: None if curve is None else {"sizes": list(curve.sizes), "seconds": list(curve.seconds)}
        for name, curve in curves.items()
    }
