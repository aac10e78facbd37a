"""Tick tables of pipelines: what may run when, what is held, and the bubbles that the papers' formulas give."""

import dataclasses

import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.sharding.pipeline_schedule import (
    IDLE,
    POLICIES,
    TRAINING,
    Request,
    bubble_formula,
    decode_table,
    held_formula,
    training_table,
)

REQUESTS = [Request(p, n) for p, n in [(17, 6), (5, 9), (33, 4), (1, 8), (9, 7), (21, 5), (3, 3), (40, 6)]]


def ticks_of(rows):
    """{(stage, micro-batch): tick}; each once."""
    found = {}
    for t, row in enumerate(rows):
        for s, m in enumerate(row):
            if m != IDLE:
                assert (s, m) not in found
                found[s, m] = t
    return found


def violations(table):
    """What a table breaks: order along the stages, and slots `m % held` that are overwritten while in use."""
    forward, backward, bad = ticks_of(table.forward), ticks_of(table.backward), []
    for s in range(table.stages):
        for m in range(table.microbatches):
            if s and forward[s, m] <= forward[s - 1, m]:
                bad.append(f"forward {m} on stage {s} before its input")
            if s + 1 < table.stages and backward[s, m] != backward[s + 1, m] + 1:
                bad.append(f"backward {m} on stage {s} not right after its gradient")  # the program keeps just one
            if backward[s, m] < forward[s, m]:
                bad.append(f"backward {m} on stage {s} before its forward")
            later = m + table.held
            # An input is in its slot from its arrival to its backward; the next one there comes after that.
            if later < table.microbatches and s and forward[s - 1, later] + 1 <= backward[s, m]:
                bad.append(f"slot of {m} on stage {s} overwritten by {later}")
    return bad


@pytest.mark.parametrize("name", TRAINING)
def test_training_tables_hold_what_the_formulas_say(name):
    for stages in (1, 2, 3, 4, 8):
        for microbatches in (1, 2, 3, 5, 8, 16):
            table = training_table(name, stages, microbatches)
            assert len(ticks_of(table.forward)) == len(ticks_of(table.backward)) == stages * microbatches
            assert not violations(table)
            assert table.bubble == pytest.approx(bubble_formula(name, stages, microbatches))
            assert table.held == held_formula(name, stages, microbatches)
    assert training_table("1f1b", 4, 64).held == 4 < training_table("gpipe", 4, 64).held == 64
    assert [training_table("1f1b", 4, 9).held_by(s) for s in (0, 3)] == [4, 2]
    assert training_table("gpipe", 3, 5).ticks == training_table("1f1b", 3, 5).ticks == 2 * (5 + 3 - 1)


def test_a_wrong_training_table_is_seen():
    """Negative controls: backwards two ticks early, and one slot fewer than the table needs."""
    table = training_table("1f1b", 3, 6)
    early = dataclasses.replace(table, backward=(*table.backward[2:], *[(IDLE,) * 3] * 2))
    assert any("before its forward" in x for x in violations(early))

    class Fewer(type(table)):
        held = 2

    fewer = Fewer(**{f.name: getattr(table, f.name) for f in dataclasses.fields(table)})
    assert any("overwritten" in x for x in violations(fewer))


def check_served(table, requests, rows):
    """Every prompt read once and in order, then decoded once a token, on rows of its own, never before its token."""
    read, made, holder, fed = [0] * len(requests), [0] * len(requests), {}, {}
    for i, item in enumerate(table.items):
        if item.request != IDLE:
            q = item.request
            assert item.start == read[q] and item.count <= table.chunk and made[q] == 0
            assert item.first == (item.start == 0)
            if item.first:
                before = holder.get(item.row)
                assert before is None or made[before] == requests[before].new
                holder[item.row] = q
            assert holder[item.row] == q
            read[q] += item.count
        for j, (q, step) in enumerate(zip(item.rows, item.steps, strict=True)):
            if q == IDLE:
                continue
            assert holder[item.group * rows + j] == q and read[q] == requests[q].prompt - 1
            assert q != item.request
            assert step == made[q]
            made[q] += 1
        if item.group != IDLE:
            assert item.group not in fed or table.at[i][0] >= table.at[fed[item.group]][-1] + 1
            fed[item.group] = i
    assert read == [one.prompt - 1 for one in requests] and made == [one.new for one in requests]
    for one, after in zip(table.at, table.at[1:], strict=False):
        assert all(a < b for a, b in zip(one, after, strict=True))
    assert all(a < b for row in table.at for a, b in zip(row, row[1:], strict=False))


@pytest.mark.parametrize("policy", POLICIES)
def test_decode_tables_serve_every_request(policy):
    for stages, groups, rows, chunk in [(1, 1, 1, 4), (2, 2, 2, 4), (3, 3, 2, 5), (4, 5, 1, 16)]:
        table = decode_table(REQUESTS, stages=stages, groups=groups, rows=rows, chunk=chunk, policy=policy)
        check_served(table, REQUESTS, rows)
        work = ticks_of(table.work())
        assert len(work) == stages * len(table.items)
        assert table.bubble == pytest.approx(1 - len(work) / (table.ticks * stages))
        assert table.held >= 1 and (policy == "whole" or table.held == 1)


def test_piggybacking_shrinks_the_bubble():
    """SARATHI's claim, in ticks: uneven prompts stall a pipeline; chunks of one size with decoding aboard do not."""
    found = {
        policy: decode_table(REQUESTS * 3, stages=4, groups=4, rows=2, chunk=4, policy=policy) for policy in POLICIES
    }
    idle = {policy: table.ticks - len(table.items) for policy, table in found.items()}
    assert idle["piggyback"] <= idle["chunked"] < idle["whole"]
    assert found["piggyback"].bubble < 0.5 * found["whole"].bubble
    assert found["piggyback"].ticks < found["chunked"].ticks < found["whole"].ticks
    # Equal work: what is left is the filling and draining of the pipeline.
    steady = decode_table([Request(1, 50)] * 8, stages=4, groups=4, rows=2, chunk=4)
    assert steady.ticks - len(steady.items) <= 2 * (4 - 1)
    # Fewer groups than stages: no micro-batch is there to fill the rest, whatever the policy.
    starved = decode_table([Request(1, 50)] * 2, stages=4, groups=1, rows=2, chunk=4)
    assert starved.bubble == pytest.approx(3 / 4, abs=0.02)


def test_decoding_is_never_delayed_by_a_prompt():
    """A group decodes every `stages` ticks while a prompt is read beside it; in one whole, the prompt stalls it."""

    def longest_wait(policy):
        table = decode_table([Request(2, 30), Request(61, 2)], stages=2, groups=2, rows=1, chunk=4, policy=policy)
        ends = [at[-1] for item, at in zip(table.items, table.at, strict=True) if 0 in item.rows]
        return max(b - a for a, b in zip(ends, ends[1:], strict=False))

    assert longest_wait("piggyback") == 2
    assert longest_wait("whole") > 15


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: training_table("zero-bubble", 2, 2), "'zero-bubble' is unknown.*gpipe, 1f1b"),
        (lambda: training_table("1f1b", 2, 0), "at least 1 stage and 1 micro-batch, got 2 and 0"),
        (lambda: decode_table([], stages=1, groups=1, rows=1, chunk=1), "no request"),
        (lambda: decode_table(REQUESTS, stages=1, groups=0, rows=1, chunk=1), "groups: got 0"),
        (lambda: decode_table(REQUESTS, stages=1, groups=1, rows=1, chunk=1, policy="orca"), "'orca' is unknown"),
        (lambda: decode_table([Request(0, 1)], stages=1, groups=1, rows=1, chunk=1), "request 0: got a prompt of 0"),
    ],
)  # fmt: skip
def test_tables_that_make_no_sense_are_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
