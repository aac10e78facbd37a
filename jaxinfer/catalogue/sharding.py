"""Rows of the catalogue: meshes, strategies, pipelines, overlap, weights larger than memory.

Stability: internal.
"""

from jaxinfer.catalogue.entry import Method, Paper

METHODS: tuple[Method, ...] = (
    Method(
        name="fsdp",
        family="sharding",
        title="rows and every weight split, weights gathered where they are used",
        guarantee="exact",
        entry="jaxinfer.sharding.strategies:sharded",
        paper=Paper("Rajbhandari et al.", 2020, "1910.02054"),
        cli="--mesh fsdp=8",
    ),
    Method(
        name="tensor-parallel",
        family="sharding",
        title="heads and MLP columns split, two sums a layer; caches split with the heads",
        guarantee="exact",
        entry="jaxinfer.sharding.strategies:strategy_for",
        paper=Paper("Shoeybi et al.", 2019, "1909.08053"),
        cli="--mesh tensor=4",
    ),
    Method(
        name="sequence-parallel",
        family="sharding",
        title="tensor parallelism with tokens split between its blocks",
        guarantee="exact",
        entry="jaxinfer.sharding.strategies:product",
        paper=Paper("Korthikanti et al.", 2022, "2205.05198"),
    ),
    Method(
        name="expert-parallel",
        family="sharding",
        title="a mixture's experts on several devices, tokens sent to theirs and back, none dropped",
        guarantee="exact",
        entry="jaxinfer.sharding.experts:apply",
        paper=Paper("Lepikhin et al.", 2020, "2006.16668"),
        cli="--mesh expert=8",
    ),
    Method(
        name="ring-attention",
        family="sharding",
        title="the tokens of a row and the slots of its cache split, keys passed round a ring",
        guarantee="exact",
        entry="jaxinfer.sharding.ring_attention:ring_attention",
        paper=Paper("Liu et al.", 2023, "2310.01889"),
        cli="--mesh context=8",
    ),
)
