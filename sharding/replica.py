"""One model replica over several processes: process 0 drives the batch job, the others do what its engine does.

The runner sees an engine like any other. Process 0's `Lead` tells each call to the others before it makes it, and they
make the same call on theirs, so that all run the same programs in the same order on their parts of the arrays. Only
process 0 claims, commits and writes; it and the others learn of a lost peer from `watch.py`.

Stability: experimental.
"""

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxinfer.batch.requests import Limits
from jaxinfer.batch.runner import Admission, Engine, Look
from jaxinfer.errors import ConfigError, JaxinferError
from jaxinfer.sharding.watch import Watch

T = TypeVar("T")
_CALLS = ("admit", "advance", "release", "reset")


def from_process_0(watch: Watch | None, function: Callable[[], T]) -> T:
    """What `function` gives in process 0, in every process; it must be picklable. A `JaxinferError` is raised in all.

    Without a watch there is one process, and it is `function()`.
    """
    if watch is None:
        return function()
    if watch.process:
        result, error = pickle.loads(watch.receive())
        if error is not None:
            raise error
        return result
    try:
        result = function()
    except JaxinferError as error:
        watch.send(pickle.dumps((None, error)))
        raise
    watch.send(pickle.dumps((result, None)))
    return result


class Lead:
    """The engine of process 0: each call is made in all processes. An Engine (batch/runner.py)."""

    def __init__(self, engine: Engine, watch: Watch):
        self._engine, self._watch = engine, watch
        if getattr(getattr(engine, "settings", None), "grammars", False):
            raise ConfigError(
                f"grammars: got rows with a grammar in {watch.processes} processes; accepted: in one process, "
                "since a grammar's state stays in the process that compiled it"
            )

    @property
    def slots(self) -> int:
        return self._engine.slots

    @property
    def limits(self) -> Limits:
        return self._engine.limits

    def admit(self, admissions: Sequence[Admission]) -> None:
        self._tell("admit", list(admissions))
        self._engine.admit(admissions)

    def advance(self) -> Look:
        self._tell("advance")
        return self._engine.advance()

    def release(self, slot: int) -> None:
        self._tell("release", slot)
        self._engine.release(slot)

    def reset(self) -> None:
        self._tell("reset")
        self._engine.reset()

    def end(self, result: Any) -> None:
        """No more calls: `follow` returns `result` in the others."""
        self._tell("end", result)

    def _tell(self, call: str, *arguments: Any) -> None:
        self._watch.send(pickle.dumps((call, arguments)))


def follow(engine: Engine, watch: Watch, stop: Callable[[], bool] = lambda: False) -> Any:
    """Makes the calls that process 0 makes until it ends; what it ends with. Once `stop` is true, process 0 is told.

    A call that raises here has raised in process 0 too, which then goes on with `reset`.
    """

    def look() -> None:
        if stop():
            watch.ask_stop()

    while True:
        call, arguments = pickle.loads(watch.receive(look))
        if call == "end":
            return arguments[0]
        assert call in _CALLS, call
        try:
            getattr(engine, call)(*arguments)
        except Exception:
            continue
