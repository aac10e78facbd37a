"""Incremental text: whole characters only, and stop strings that do not depend on how the tokens arrived."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.decode.text import Detokenizer, StopMatcher
from jaxinfer.errors import InputError


def lossy(ids):
    """A byte-level decoder: one token a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def fallback(ids):
    """A byte-fallback decoder: a run of byte tokens (below 256) that is not UTF-8 becomes one U+FFFD for each byte.

    Ids from 256 are words with a space before them, which is dropped at the start.
    """
    text, run = "", []
    for token in [*ids, None]:
        if token is not None and token < 256:
            run.append(token)
            continue
        try:
            text += bytes(run).decode()
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        run = []
        text += f" w{token}" if token is not None else ""
    return text.removeprefix(" ") if ids and ids[0] >= 256 else text


def chunks(data, pieces):
    """`data` cut after each of `pieces` items, the rest at the end."""
    out = []
    for size in pieces:
        out.append(data[:size])
        data = data[size:]
    return [*out, data]


texts = st.text(alphabet="aβ你🦜 \n", max_size=30)
sizes = st.lists(st.integers(0, 4), max_size=60)


@settings(max_examples=80, deadline=None)
@given(text=texts, sizes=sizes)
@pytest.mark.parametrize("decode", [lossy, fallback])
def test_pieces_join_to_the_whole_text(decode, text, sizes):
    ids = list(text.encode())
    stream = Detokenizer(decode)
    pieces = [stream.push(piece) for piece in chunks(ids, sizes)]
    assert "".join(pieces) + stream.flush() == decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=80, deadline=None)
@given(data=st.binary(max_size=40), sizes=sizes)
def test_damaged_bytes_are_given_out_too(data, sizes):
    stream = Detokenizer(lossy)
    out = "".join(stream.push(piece) for piece in chunks(list(data), sizes)) + stream.flush()
    assert out == lossy(data)


def test_spaces_between_words_survive():
    ids = [300, 301, *"é".encode(), 302]
    stream = Detokenizer(fallback)
    assert "".join(stream.push([i]) for i in ids) + stream.flush() == fallback(ids) == "w300 w301é w302"


def cut(text, stops, floor=0):
    """The oracle: read character by character and stop at the first stop string that ends after `floor`."""
    for end in range(floor + 1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=24),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3),
    sizes=sizes,
    skipped=st.integers(0, 3),
)
def test_stops_do_not_depend_on_the_pieces(text, stops, sizes, skipped):
    matcher, out, stopped, floor = StopMatcher(stops), "", False, 0
    for number, piece in enumerate(chunks(text, sizes)):
        if number < skipped:
            floor += len(piece)
        visible, stopped = matcher.push(piece, may_stop=number >= skipped)
        out += visible
        assert text.startswith(out)
        if stopped:
            break
    assert (out + matcher.flush(), stopped) == cut(text, stops, floor)


def test_the_longest_partial_match_is_held_back():
    matcher = StopMatcher(["</s>", "s>!"])
    assert matcher.push("ab<") == ("ab", False)
    assert matcher.push("/") == ("", False)
    assert matcher.push("s") == ("", False)
    assert matcher.push("x") == ("</sx", False)
    assert matcher.push("</s>tail") == ("", True)
    assert matcher.push("more") == ("", True)


def test_an_empty_stop_is_refused():
    with pytest.raises(InputError, match="none of them empty"):
        StopMatcher([""])
