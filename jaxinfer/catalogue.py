"""One table of every method: name, family, paper, guarantee, where it is defined, and how the command line spells it.

`jaxinfer methods` prints it, the README's table is made from it (scripts/make_readme.py), and a test imports every
entry and checks that every method file is listed. A new method adds its file and its row here.

Stability: experimental.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from jaxinfer.errors import InputError

GUARANTEES = ("exact", "exact in distribution", "approximate", "a different model")


@dataclasses.dataclass(frozen=True)
class Paper:
    """Where a method comes from; `arxiv` is None for a paper that is not there."""

    authors: str
    year: int
    arxiv: str | None = None

    def __str__(self) -> str:
        return f"{self.authors} {self.year}" + (f", arXiv {self.arxiv}" if self.arxiv else "")


@dataclasses.dataclass(frozen=True)
class Method:
    """One method. `paper` is None for what is common knowledge.

    `entry` is "module:attribute"; `cli` what a batch user types, if anything; `effect` the key of the method's row in
    the results of its family's benchmark.
    """

    name: str
    family: str
    title: str
    guarantee: str
    entry: str
    paper: Paper | None = None
    cli: str | None = None
    effect: str | None = None

    def __post_init__(self):
        if self.guarantee not in GUARANTEES:
            raise InputError(f"method {self.name!r}: guarantee {self.guarantee!r} is none of {GUARANTEES}")
        if self.entry.count(":") != 1:
            raise InputError(f"method {self.name!r}: entry {self.entry!r} is not 'module:attribute'")


_SPECULATIVE = Paper("Leviathan, Kalman, Matias", 2022, "2211.17192")

METHODS: tuple[Method, ...] = (
    # What proposes tokens.
    Method(
        name="plain",
        family="drafter",
        title="autoregression, one token a forward",
        guarantee="exact",
        entry="jaxinfer.decode.autoregressive:Autoregressive",
    ),
    Method(
        name="draft",
        family="drafter",
        title="a small model proposes the next gamma tokens",
        guarantee="exact in distribution",
        entry="jaxinfer.decode.draft_model:DraftModel",
        paper=_SPECULATIVE,
        cli="--drafter draft",
    ),
    # What decides which proposals stay.
    Method(
        name="greedy",
        family="verifier",
        title="keeps the drafts that the target would have chosen itself",
        guarantee="exact",
        entry="jaxinfer.decode.verify:Greedy",
        paper=_SPECULATIVE,
    ),
    Method(
        name="chain",
        family="verifier",
        title="speculative rejection sampling along a chain",
        guarantee="exact in distribution",
        entry="jaxinfer.decode.verify:Chain",
        paper=_SPECULATIVE,
    ),
    # How a token is chosen.
    Method(
        name="sampling",
        family="sampling",
        title="temperature, top-k, top-p, penalties, biases and bans, each a row's own",
        guarantee="exact",
        entry="jaxinfer.decode.sampling:Sampling",
        paper=Paper("Holtzman, Buys, Du, Forbes, Choi", 2019, "1904.09751"),
        cli="--temperature, --top-k, --top-p, ...",
    ),
    Method(
        name="min-p",
        family="sampling",
        title="drops tokens below a share of the likeliest one's probability",
        guarantee="exact",
        entry="jaxinfer.decode.sampling:Sampling",
        paper=Paper("Nguyen et al.", 2024, "2407.01082"),
        cli="--min-p",
    ),
    Method(
        name="beam",
        family="sampling",
        title="the best-scored of several continuations kept side by side",
        guarantee="approximate",
        entry="jaxinfer.decode.beam:beam_search",
    ),
    # What a model remembers.
    Method(
        name="dense",
        family="cache",
        title="every key and value kept",
        guarantee="exact",
        entry="jaxinfer.cache.dense:Dense",
        cli="--cache auto",
    ),
    Method(
        name="ring",
        family="cache",
        title="the keys and values of a sliding window",
        guarantee="exact",
        entry="jaxinfer.cache.dense:ring",
        cli="--cache auto",
    ),
    Method(
        name="sink",
        family="cache",
        title="attention sinks: the first tokens and a sliding window",
        guarantee="approximate",
        entry="jaxinfer.cache.sink:Sink",
        paper=Paper("Xiao, Tian, Chen, Han, Lewis", 2023, "2309.17453"),
        cli="--cache sink",
    ),
    Method(
        name="int8-cache",
        family="cache",
        title="int8 keys per channel in groups of tokens, values per token, recent tokens in full",
        guarantee="approximate",
        entry="jaxinfer.cache.int8:Int8",
        paper=Paper("Liu et al.", 2024, "2402.02750"),
        cli="--cache int8",
    ),
    # What a weight is.
    Method(
        name="int8",
        family="weights",
        title="8-bit integers, a scale a channel or group; with int8 activations where asked",
        guarantee="approximate",
        entry="jaxinfer.quant.integers:Int8",
        paper=Paper("Dettmers, Lewis, Belkada, Zettlemoyer", 2022, "2208.07339"),
        cli="--weights int8",
    ),
    Method(
        name="int4",
        family="weights",
        title="4-bit integers in groups, with zero points",
        guarantee="approximate",
        entry="jaxinfer.quant.integers:Int4",
        paper=Paper("Frantar, Ashkboos, Hoefler, Alistarh", 2022, "2210.17323"),
        cli="--weights int4:group=64",
    ),
    Method(
        name="int3",
        family="weights",
        title="3-bit integers in groups, with zero points",
        guarantee="approximate",
        entry="jaxinfer.quant.integers:Int3",
        paper=Paper("Frantar, Ashkboos, Hoefler, Alistarh", 2022, "2210.17323"),
        cli="--weights int3:group=64",
    ),
    Method(
        name="int2",
        family="weights",
        title="2-bit integers in groups, with zero points",
        guarantee="approximate",
        entry="jaxinfer.quant.integers:Int2",
        paper=Paper("Frantar, Ashkboos, Hoefler, Alistarh", 2022, "2210.17323"),
        cli="--weights int2:group=64",
    ),
    Method(
        name="fp8",
        family="weights",
        title="float8 (e4m3, e5m2) with a scale a block of rows and inputs",
        guarantee="approximate",
        entry="jaxinfer.quant.floats:Fp8",
        paper=Paper("Micikevicius et al.", 2022, "2209.05433"),
        cli="--weights fp8:group=128,rows=128",
    ),
    Method(
        name="fp6",
        family="weights",
        title="6-bit floats e3m2 in a plane of four bits and one of two",
        guarantee="approximate",
        entry="jaxinfer.quant.floats:Fp6",
        paper=Paper("Wu et al.", 2023, "2312.08583"),
        cli="--weights fp6",
    ),
    Method(
        name="mxfp4",
        family="weights",
        title="4-bit floats in groups of 32 that share a power of two",
        guarantee="approximate",
        entry="jaxinfer.quant.floats:MxFp4",
        paper=Paper("Rouhani et al.", 2023, "2310.10537"),
        cli="--weights mxfp4",
    ),
    Method(
        name="nvfp4",
        family="weights",
        title="4-bit floats in groups of 16 with float8 scales",
        guarantee="approximate",
        entry="jaxinfer.quant.floats:NvFp4",
        paper=Paper("Egiazarian et al.", 2025, "2509.23202"),
        cli="--weights nvfp4",
    ),
    Method(
        name="ternary",
        family="weights",
        title="-1, 0 and 1 times a scale a channel or group",
        guarantee="approximate",
        entry="jaxinfer.quant.ternary:Ternary",
        paper=Paper("Ma et al.", 2024, "2402.17764"),
        cli="--weights ternary",
    ),
    Method(
        name="trit-planes",
        family="weights",
        title="the sum of two ternary matrices, fitted without data",
        guarantee="approximate",
        entry="jaxinfer.quant.trit_planes:TritPlanes",
        paper=Paper("Xiao et al.", 2025, "2509.16989"),
        cli="--weights trit-planes:group=128",
    ),
    Method(
        name="mixed-rows",
        family="weights",
        title="int8 for the outputs that lose most, int4 for the rest",
        guarantee="approximate",
        entry="jaxinfer.quant.mixed_rows:Mixed",
        paper=Paper("Zheng et al.", 2024, "2412.14590"),
        cli="--weights mixed:share=0.1",
    ),
    Method(
        name="lora",
        family="weights",
        title="a frozen weight plus a product of two thin ones",
        guarantee="a different model",
        entry="jaxinfer.quant.lora:lora",
        paper=Paper("Hu et al.", 2021, "2106.09685"),
    ),
    Method(
        name="extended-rows",
        family="weights",
        title="new vocabulary rows beside an untouched embedding",
        guarantee="exact",
        entry="jaxinfer.quant.extended:ExtendedRows",
    ),
    # How a model knows where a token stands.
    Method(
        name="rope",
        family="position",
        title="rotary position embedding, with the linear, dynamic and llama3 scalings",
        guarantee="exact",
        entry="jaxinfer.ops.position:Rope",
        paper=Paper("Su et al.", 2021, "2104.09864"),
    ),
    Method(
        name="yarn",
        family="position",
        title="RoPE stretched by frequency bands: Rope(scaling='yarn')",
        guarantee="a different model",
        entry="jaxinfer.ops.position:Rope",
        paper=Paper("Peng, Quesnelle, Fan, Shippole", 2023, "2309.00071"),
    ),
    Method(
        name="longrope",
        family="position",
        title="RoPE stretched by searched factors: Rope(scaling='longrope')",
        guarantee="a different model",
        entry="jaxinfer.ops.position:Rope",
        paper=Paper("Ding et al.", 2024, "2402.13753"),
    ),
    Method(
        name="alibi",
        family="position",
        title="attention with linear biases",
        guarantee="exact",
        entry="jaxinfer.ops.position:Alibi",
        paper=Paper("Press, Smith, Lewis", 2021, "2108.12409"),
    ),
    Method(
        name="t5-bias",
        family="position",
        title="a learned bias for each bucket of relative positions",
        guarantee="exact",
        entry="jaxinfer.ops.position:T5Bias",
        paper=Paper("Raffel et al.", 2019, "1910.10683"),
    ),
    Method(
        name="sinusoidal",
        family="position",
        title="absolute positions as sines and cosines",
        guarantee="exact",
        entry="jaxinfer.ops.position:sinusoid",
        paper=Paper("Vaswani et al.", 2017, "1706.03762"),
    ),
    Method(
        name="nope",
        family="position",
        title="no encoding at all: ModelConfig(position='none')",
        guarantee="exact",
        entry="jaxinfer.models.config:ModelConfig",
        paper=Paper("Kazemnejad, Padhi, Natesan, Das, Reddy", 2023, "2305.19466"),
    ),
)


def by_name(name: str) -> Method:
    """The method of that name; InputError lists the names there are."""
    for method in METHODS:
        if method.name == name:
            return method
    raise InputError(f"no method {name!r}; methods: {', '.join(sorted(m.name for m in METHODS))}")


def families(methods: Iterable[Method] = METHODS) -> tuple[str, ...]:
    """The families in the order in which they first appear."""
    return tuple(dict.fromkeys(method.family for method in methods))


COLUMNS = ("method", "family", "what it does", "paper", "guarantee", "command line")


def table(methods: Sequence[Method] = METHODS) -> list[tuple[str, ...]]:
    """The catalogue as rows of text under `COLUMNS`, grouped by family: what `jaxinfer methods` and the README show."""
    order = families(methods)
    return [
        (m.name, m.family, m.title, str(m.paper or ""), m.guarantee, m.cli or "")
        for m in sorted(methods, key=lambda m: order.index(m.family))
    ]
