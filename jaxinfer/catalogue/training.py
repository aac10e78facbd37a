"""Rows of the catalogue: how models are trained, adapted and made small by training.

Stability: internal.
"""

from jaxinfer.catalogue.entry import Method, Paper

METHODS: tuple[Method, ...] = (
    Method(
        name="trilm",
        family="training",
        title="training with three values a matrix, straight-through gradients, packed 2-bit export",
        guarantee="a different model",
        entry="jaxinfer.train.trilm:TernaryNextToken",
        paper=Paper("Kaushal et al.", 2024, "2407.12327"),
    ),
    Method(
        name="fastdraft",
        family="training",
        title="a draft model in three stages: text, code, alignment with what the target writes",
        guarantee="a different model",
        entry="jaxinfer.train.draft:train_draft",
        paper=Paper("Zafrir et al.", 2024, "2411.11055"),
        cli="train draft",
    ),
    Method(
        name="seco",
        family="training",
        title="long sequences chunk by chunk: the exact gradient in the memory of one chunk",
        guarantee="exact",
        entry="jaxinfer.train.chunkwise:Chunkwise",
        paper=Paper("Li et al.", 2025, "2505.16710"),
        cli="train long --sampling all",
    ),
    Method(
        name="spaco",
        family="training",
        title="the same from a random few of the chunks: unbiased, or the paper's fixed number",
        guarantee="approximate",
        entry="jaxinfer.train.chunkwise_sampling:Sampling",
        paper=Paper("Li et al.", 2025, "2505.16710"),
        cli="train long --budget 8",
    ),
    Method(
        name="ulorl",
        family="training",
        title="reinforcement on long answers, rolled out in segments; tokens that are mastered are masked",
        guarantee="a different model",
        entry="jaxinfer.train.ulorl:UloRL",
        paper=Paper("Du et al.", 2025, "2507.19766"),
        cli="train rl --task sort",
    ),
    Method(
        name="remat",
        family="training",
        title="layers that compute again, in the backward pass, what they did not keep; or keep it on the host",
        guarantee="exact",
        entry="jaxinfer.train.remat:remat",
        paper=Paper("Chen et al.", 2016, "1604.06174"),
    ),
    Method(
        name="ssdtrain",
        family="training",
        title="activations on a disk: written behind the forward pass, read ahead of the backward pass",
        guarantee="exact",
        entry="jaxinfer.train.disk_offload:OffloadStep",
        paper=Paper("Wu et al.", 2024, "2408.10013"),
    ),
    Method(
        name="specvlm",
        family="training",
        title="an EAGLE head on the target's logits and features, made anew in each update",
        guarantee="a different model",
        entry="jaxinfer.train.specvlm:recipe",
        paper=Paper("Huang et al.", 2025, "2509.11815"),
        cli="train heads --kind eagle --objective specvlm",
    ),
)
