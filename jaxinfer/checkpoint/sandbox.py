"""A Jinja environment for templates that nobody has read: immutable, sandboxed, and within a budget.

Jinja's sandbox keeps a template from the interpreter's insides and bounds `range`, but not nested loops, recursive
macros, or strings and lists that double. Here loop turns and calls are counted, text and lists built are charged by
their length, an integer handed to a string's method or filter may not be a size that hurts, and a rendering has a
deadline. This stops accidents and plain bombs; it is no proof against every way to waste a second.

Stability: internal.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

TURNS = 500_000  # loop turns and calls of one rendering
CHARACTERS = 50_000_000  # characters and list items built in one rendering
SECONDS = 5.0
_SIZE = 1_000_000  # the largest width, indent or count that a string may be given
_DIGITS = 4096  # bits of an integer
# Filters that only look at a container's spine; every other one may write its whole contents out as text.
_SHALLOW = frozenset(
    "attr batch count d default dictsort first groupby items last length list map max min random reject rejectattr "
    "reverse select selectattr slice sort sum unique".split()
)


class BudgetExceeded(Exception):
    """A template took more turns or built more text than any honest one needs."""


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.turns = TURNS
        self.characters = CHARACTERS
        self.deadline = time.monotonic() + SECONDS

    def turn(self) -> None:
        """Charge a loop turn or a call."""
        self.turns -= 1
        if self.turns < 0:
            raise BudgetExceeded(f"takes more than {TURNS} loop turns and calls")
        if time.monotonic() > self.deadline:
            raise BudgetExceeded(f"takes more than {SECONDS:g} s")

    def built(self, size: int) -> None:
        """Charge text or a list that is about to be built."""
        self.characters -= size
        if self.characters < 0:
            raise BudgetExceeded(f"builds more than {CHARACTERS} characters")

    def written(self, value: Any) -> None:
        """Charge a value that is about to become text: containers by all that they hold, each time they hold it."""
        if isinstance(value, str):
            self.built(len(value))
        elif isinstance(value, dict):
            for key, item in value.items():
                self.turn()
                self.written(key)
                self.written(item)
        elif isinstance(value, list | tuple | set | frozenset):
            for item in value:
                self.turn()
                self.written(item)

    def sized(self, name: str, values: Iterable[Any]) -> None:
        """Refuse integers that, as widths, indents or counts, are sizes no prompt needs."""
        for value in values:
            if isinstance(value, int) and not -_SIZE <= value <= _SIZE:
                shown = value if value.bit_length() < 99 else "of many digits"
                raise BudgetExceeded(f"hands {name} the size {shown}")

    def formatted(self, form: str) -> None:
        """Refuse a format string with a width or precision of millions."""
        if re.search(r"\d{7}", form):
            raise BudgetExceeded(f"formats to the width of {form[:40]!r}")


class _Context(jinja2.runtime.Context):
    """A rendering's variables, and its budget beside them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.budget = Budget()


class _Generator(jinja2.compiler.CodeGenerator):
    """Emits `~` as a call that counts, because the sandbox intercepts no concatenation."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.concatenate(context, (")
        for expression in node.nodes:
            self.visit(expression, frame)
            self.write(", ")
        self.write("))")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks an assistant's words for training masks; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with a budget; whitespace rules and extensions are those that chat templates are written for."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])
    code_generator_class = _Generator
    context_class = _Context

    def __init__(self) -> None:
        # Unoptimized: constant folding would run filters while compiling, outside any budget.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            optimized=False,
            finalize=_finalize,
        )
        self.filters = {name: _guarded(name, f) for name, f in self.filters.items()} | {"_loop": _loop}
        self.globals = {"range": jinja2.sandbox.safe_range, "dict": _dict, "namespace": _Namespace}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter under the same budget as Jinja's own."""
        self.filters[name] = _guarded(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            counted = jinja2.nodes.Filter(loop.iter, "_loop", [], [], None, None, lineno=loop.lineno)
            loop.iter = counted.set_environment(self)
        return tree

    def call(self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(__context)
        budget.turn()
        if isinstance(__obj, jinja2.runtime.LoopContext):  # loop(children) of a recursive loop
            args = tuple(_Counted(a, budget) for a in args)
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # the sandbox wraps str.format
        if isinstance(owner, str):
            budget.sized("a text method", (*args, *kwargs.values()))
            budget.formatted(owner)
            budget.written(args)
            if getattr(__obj, "__name__", "") in ("replace", "join", "translate") and args:
                budget.built(len(owner) * max((len(a) for a in args if isinstance(a, Sized)), default=0))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str | list | tuple):
            budget.built(len(result))
        return result

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    budget.built(len(many) * max(times, 0))
        elif operator == "%" and isinstance(left, str):
            budget.formatted(left)
            budget.sized("%", right if isinstance(right, tuple) else (right,) if "*" in left else ())
            budget.written(right)
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            budget.built(len(left) + len(right))
        if isinstance(left, int) and isinstance(right, int):
            digits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if digits > _DIGITS:
                raise BudgetExceeded("computes with numbers of thousands of digits")
        return super().call_binop(context, operator, left, right)

    def concatenate(self, context: jinja2.runtime.Context, parts: Iterable[Any]) -> str:
        """What `~` does."""
        values = list(parts)
        _budget(context).written(values)
        return "".join(map(str, values))


def _budget(context: jinja2.runtime.Context) -> Budget:
    return context.budget if isinstance(context, _Context) else Budget()


@jinja2.pass_context
def _finalize(context: jinja2.runtime.Context, value: Any) -> Any:
    _budget(context).written(value)
    return value


@jinja2.pass_context
def _loop(context: jinja2.runtime.Context, items: Any) -> Any:
    return items if isinstance(items, jinja2.Undefined) else _Counted(items, _budget(context))


class _Counted:
    """An iterable that charges a turn an item, and has a length where the original has (`loop.last`, `loop.length`)."""

    def __init__(self, items: Any, budget: Budget):
        self._items = items
        self._budget = budget

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._budget.turn()
            yield item

    def __len__(self) -> int:
        return len(self._items)  # its TypeError is what Jinja expects of an iterator


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with its input and its integer arguments checked first."""
    wants = getattr(function, "jinja_pass_arg", None)
    kind = getattr(wants, "name", None)  # "context", "eval_context", "environment" or None

    @jinja2.pass_context
    def guarded(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.turn()
        budget.sized(f"the filter {name}", (*args, *kwargs.values()))
        if name not in _SHALLOW:
            budget.written(value)
            budget.written(args)
        if name == "format" and isinstance(value, str):
            budget.formatted(value)
        if name in ("replace", "join", "indent") and isinstance(value, Sized):
            budget.built(len(value) * max((len(a) for a in args if isinstance(a, Sized)), default=1))
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        return function(*([first[kind]] if kind in first else []), value, *args, **kwargs)

    return guarded


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """Not the type itself: its attributes lead out of the sandbox."""
    return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works, as in Jinja
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")
