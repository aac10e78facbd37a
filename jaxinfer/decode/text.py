"""Text from tokens as they come: an incremental detokenizer, a stop-string matcher, and both in a row (no arrays).

A token may hold a part of a character, and a stop string may begin in one token and end in another. `Detokenizer`
gives out only whole characters; `StopMatcher` gives out only text that can no longer become part of a stop string.
Where an answer ends depends on the tokens alone, never on how many of them arrived at a time.

Stability: experimental.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxinfer.errors import InputError

# Byte-fallback decoders write one U+FFFD for each byte of an unfinished character, and a character has at most
# three unfinished bytes: a longer run is really damaged text and must not be held back for ever.
_UNFINISHED = 3
_REPLACEMENT = "\ufffd"


@dataclass
class Detokenizer:
    """Turns token ids into text a few at a time, through `decode(ids) -> str`.

    The text of all `push` calls and the final `flush` joined is the text of all ids. Only a short window of ids is
    decoded at each call: the ids of the last text given out, which a decoder needs to see in order to space and join
    what follows, and the new ones.
    """

    decode: Callable[[Sequence[int]], str]
    _window: list[int] = field(default_factory=list)
    _context: int = 0  # how many ids at the window's start are given out whole
    _given: str = ""  # the window's text so far given out

    def push(self, ids: Sequence[int]) -> str:
        """The new text that is certain after `ids`; "" while a character is unfinished."""
        return "".join(self._one(token) for token in ids)

    def flush(self) -> str:
        """What is still held back, unfinished characters as U+FFFD."""
        new = self.decode(self._window)[len(self._given) :]
        self._window, self._context, self._given = [], 0, ""
        return new

    def _one(self, token: int) -> str:
        self._window.append(token)
        text = self.decode(self._window)
        if not text.startswith(self._given):
            # A byte-fallback decoder takes back a whole run of bytes while its last character is unfinished.
            if len(self._window) - self._context <= _UNFINISHED:
                return ""
            self._window, self._context, self._given = self._window[self._context :], 0, ""
            text = self.decode(self._window)
        held = 0
        while held < _UNFINISHED and text[: len(text) - held].endswith(_REPLACEMENT):
            held += 1
        certain = text[: len(text) - held]
        new = certain[len(self._given) :]
        self._given = max(self._given, certain, key=len)
        if new and not held:  # a border between characters: what came before it is not needed any more
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._given = self.decode(self._window)
        return new


@dataclass
class StopMatcher:
    """Cuts text at the first of several stop strings, whatever pieces the text comes in.

    The first match is the one that ends first; among those that end together, the longest. `push` returns the text
    that is now safe to show and whether a stop string was met; after that the matcher takes nothing more.
    """

    stops: Sequence[str]
    _held: str = ""
    _seen: int = 0  # characters of `_held` in which no match can end any more
    stopped: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stops, str) or not all(isinstance(stop, str) and stop for stop in self.stops):
            raise InputError(f"stop: got {self.stops!r}; accepted: a list of strings, none of them empty")

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """(visible text, stopped). With `may_stop` False a match that ends within `text` is let through."""
        if self.stopped:
            return "", True
        self._held += text
        if not may_stop:
            self._seen = len(self._held)
        match = self._first_match()
        if match is not None:
            self.stopped = True
            visible, self._held = self._held[: match[1]], ""
            return visible, True
        keep = self._partial()
        visible, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._seen = len(self._held)
        return visible, False

    def flush(self) -> str:
        """The text held back for a stop string that never came."""
        text, self._held, self._seen = self._held, "", 0
        return text

    def _first_match(self) -> tuple[int, int] | None:
        """(end, start) of the first match that ends after `_seen`."""
        best = None
        for stop in self.stops:
            start = self._held.find(stop, max(0, self._seen - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return best

    def _partial(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest


class CutText:
    """The text of one answer as its tokens come, up to the first of `stops`: a Detokenizer and a StopMatcher in a row.

    `stopped` tells whether a stop string was met; from then on there is no more text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]):
        self._detokenizer, self._matcher = Detokenizer(decode), StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        """A stop string was met."""
        return self._matcher.stopped

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """The text that is certain with one more token; `may_stop` as for `StopMatcher.push`."""
        return self._matcher.push(self._detokenizer.push([token]), may_stop=may_stop)[0]

    def end(self) -> str:
        """What was held back: the answer has ended. A stop string may still hide in an unfinished character."""
        visible = self._matcher.push(self._detokenizer.flush())[0]
        return visible if self.stopped else visible + self._matcher.flush()
