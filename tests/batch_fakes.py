"""A batch job without a model: a codec of bytes, an engine whose tokens follow from the row alone, a disk that kills.

Run as a program it is one worker of a job (tests start and kill it): python batch_fakes.py OUTPUT INPUT... [options].
"""

import argparse
import hashlib
import os
import signal
import sys
import time
import types
from pathlib import Path

if __name__ == "__main__":
    # The driver needs jaxinfer.decode.text alone; an empty package keeps jax out of processes that live for moments.
    import jaxinfer

    package = types.ModuleType("jaxinfer.decode")
    package.__path__ = [str(Path(jaxinfer.__file__).parent / "decode")]
    sys.modules["jaxinfer.decode"] = package

from jaxinfer.batch import job as jobs
from jaxinfer.batch.leases import Disk
from jaxinfer.batch.requests import Limits
from jaxinfer.batch.runner import Event, Look, Runner, stop_on
from jaxinfer.errors import InputError

EOS, VOCAB = 257, 260
LIMITS = Limits(max_length=700, bias=16, forced=4, stop_ids=8, top_logprobs=5)
FINGERPRINT = {"model": "fake", "versions": {"jaxinfer": "0"}}


class Codec:
    """One token a byte of UTF-8, 256 before a text."""

    vocab_size = VOCAB
    eos_ids = (EOS,)

    def encode(self, text, *, special=True):
        return [256] * special + list(text.encode())

    def encode_messages(self, messages):
        if messages[0]["role"] == "tool":
            raise InputError("messages: the template has no tool role")
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages))

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class FakeEngine:
    """Answers of letters that depend on (prompt, key) alone; "poison" in a prompt raises where it says to."""

    def __init__(self, *, slots=4, steps=3, limits=LIMITS, delay=0.0, full=False):
        self.slots, self.steps, self.limits, self.delay, self.full = slots, steps, limits, delay, full
        self.rows = {}
        self.made = 0
        self.admitted = 0

    def admit(self, admissions):
        for a in admissions:
            text = bytes(t for t in a.row.tokens if t < 256)
            if b"poison at admission" in text:
                raise ValueError("poison in the prompt")
            assert a.slot not in self.rows and 0 <= a.slot < self.slots
            self.rows[a.slot] = (a, text, [])
            self.admitted += 1

    def token(self, a, index):
        if index < len(a.row.forced):
            return a.row.forced[index]
        seed = repr((a.row.tokens, a.key if a.row.request.params.temperature else 0, index)).encode()
        number = int.from_bytes(hashlib.sha256(seed).digest()[:4], "big")
        ends = not self.full and EOS in a.row.stop_ids and number % 40 == 0
        return EOS if ends and index >= a.row.request.params.min_tokens else 97 + number % 26

    def advance(self):
        time.sleep(self.delay)
        events, ended = [], []
        for slot, (a, text, answer) in self.rows.items():
            if b"poison later" in text and len(answer) >= 3:
                raise RuntimeError("poison in the weights\nand more")
            new, reason = [], None
            while len(new) < self.steps and reason is None:
                token = self.token(a, len(answer))
                new.append(token)
                answer.append(token)
                reason = "stop" if token in a.row.stop_ids else "length" if len(answer) == a.row.limit else None
            if b"poison quietly" in text:
                events.append(Event(slot, [], finished="error", error="logits that are not finite"))
            else:
                logprobs = [-token / 100 for token in new]
                top = [tuple((token + i, -token / 100 - i) for i in range(5)) for token in new]
                events.append(Event(slot, new, logprobs, top, reason))
            if events[-1].finished:
                ended.append(slot)
        for slot in ended:
            del self.rows[slot]
        self.made += self.steps
        return Look(events, self.steps)

    def release(self, slot):
        self.rows.pop(slot, None)

    def reset(self):
        self.rows = {}


class Deadly(Disk):
    """Kills its process at the n-th step of writing or linking a file whose name begins with `label`."""

    def __init__(self, label, point, count):
        self.label, self.point, self.count = label, point, count

    def reach(self, point, path):
        if point == self.point and path.name.startswith(self.label):
            self.count -= 1
            if self.count == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def write(self, path, chunks, *, durable=True):
        def watched():
            for chunk in chunks:
                yield chunk[: len(chunk) // 2]
                self.reach("writing", path)
                yield chunk[len(chunk) // 2 :]

        super().write(path, watched(), durable=durable)
        self.reach("written", path)

    def link(self, temporary, path, *, durable=True):
        created = super().link(temporary, path, durable=durable)
        self.reach("linked", temporary)
        return created


def open_job(output, inputs, **options):
    options = {"fingerprint": FINGERPRINT, "settings": lambda survey: {"longest": survey.max_tokens}, **options}
    return jobs.open_job(output, inputs, **options)


def run(output, inputs, *, engine=None, shard_rows=8, **options):
    """A whole job in this process: (outcome, the output's bytes)."""
    names = ("stop", "grace", "poll", "progress", "most_failures")
    mine = {name: options.pop(name) for name in names if name in options}
    job = open_job(output, inputs, shard_rows=shard_rows, **options)
    runner = Runner(job, engine or FakeEngine(), Codec(), **{"poll": 0.01, **mine})
    outcome = runner.run()
    return outcome, output.read_bytes() if output.exists() else None


def work(a, death=None):
    """One worker, as the options say; its exit code."""
    label, point, count = death.split(":") if death else ("", "", 0)
    options = {"disk": Deadly(label, point, int(count)), "lease_seconds": a.lease_seconds, "shard_rows": a.shard_rows}
    with stop_on() as stop:
        job = open_job(a.output, a.inputs, **options)
        print("ready", flush=True)
        engine = FakeEngine(slots=a.slots, delay=a.delay)
        outcome = Runner(job, engine, Codec(), stop=stop, grace=a.grace, poll=0.02).run()
    return outcome.exit_code()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("inputs", type=Path, nargs="+")
    parser.add_argument("--die", help="label:point:count")
    parser.add_argument("--each", help="several of them, each in a process and a folder of its own", nargs="+")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--shard-rows", type=int, default=8)
    parser.add_argument("--grace", type=float, default=0.0)
    parser.add_argument("--lease-seconds", type=float, default=60.0)
    a = parser.parse_args()
    if not a.each:
        return work(a, a.die)
    folder = a.output
    for death in a.each:
        a.output = folder / death / "out.jsonl"
        a.output.parent.mkdir()
        child = os.fork()
        if not child:
            work(a, death)
            os._exit(0)
        if os.WTERMSIG(os.waitpid(child, 0)[1]) != signal.SIGKILL:
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
