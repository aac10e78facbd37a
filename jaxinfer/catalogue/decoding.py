"""Rows of the catalogue: what proposes tokens, what decides which stay, how a token is chosen.

Stability: internal.
"""

from jaxinfer.catalogue.entry import Method, Paper

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
    Method(
        name="prompt-lookup",
        family="drafter",
        title="copies what followed the longest n-gram that occurred before",
        guarantee="exact in distribution",
        entry="jaxinfer.decode.prompt_lookup:PromptLookup",
        paper=Paper("Saxena", 2023),
        cli="--drafter prompt-lookup",
    ),
    Method(
        name="copyspec",
        family="drafter",
        title="copies what followed the last gamma tokens when they first occurred",
        guarantee="exact in distribution",
        entry="jaxinfer.decode.copyspec:CopySpec",
        paper=Paper("Dumitru et al.", 2025, "2502.08923"),
        cli="--drafter copyspec",
    ),
    Method(
        name="bild",
        family="drafter",
        title="a small model writes while it is sure; the large one takes back what surprises it",
        guarantee="approximate",
        entry="jaxinfer.decode.bild:Bild",
        paper=Paper("Kim et al.", 2023, "2302.07863"),
        cli="--drafter bild",
    ),
    Method(
        name="pearl",
        family="drafter",
        title="a small model drafts the next block while the target reads the last one",
        guarantee="exact in distribution",
        entry="jaxinfer.decode.pearl:Pearl",
        paper=Paper("Liu et al.", 2024, "2408.11850"),
        cli="--drafter pearl",
    ),
    Method(
        name="triforce",
        family="drafter",
        title="a small model drafts for the target over a retrieval cache, and that for the whole cache",
        guarantee="exact in distribution",
        entry="jaxinfer.decode.triforce:TriForce",
        paper=Paper("Sun et al.", 2024, "2404.11912"),
        cli="--drafter triforce",
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
    Method(
        name="tree",
        family="verifier",
        title="the target's own sample at every slot of a tree decides",
        guarantee="exact in distribution",
        entry="jaxinfer.decode.verify_tree:Tree",
        paper=Paper("Miao et al.", 2023, "2305.09781"),
    ),
    Method(
        name="typical",
        family="verifier",
        title="keeps the longest path of drafts that are likely enough for the target's entropy",
        guarantee="approximate",
        entry="jaxinfer.decode.typical:Typical",
        paper=Paper("Cai et al.", 2024, "2401.10774"),
    ),
    Method(
        name="rollback",
        family="verifier",
        title="keeps drafts up to the first that surprises the target by more than a threshold",
        guarantee="approximate",
        entry="jaxinfer.decode.bild:Rollback",
        paper=Paper("Kim et al.", 2023, "2302.07863"),
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
        name="grammar",
        family="sampling",
        title="answers held to a JSON Schema, a regular expression or a grammar, token by token",
        guarantee="exact in distribution",
        entry="jaxinfer.decode.grammar:Grammar",
        paper=Paper("Willard, Louf", 2023, "2307.09702"),
        cli="--json-schema, --regex, --grammar",
    ),
    Method(
        name="beam",
        family="sampling",
        title="the best-scored of several continuations kept side by side",
        guarantee="approximate",
        entry="jaxinfer.decode.beam:beam_search",
    ),
)
