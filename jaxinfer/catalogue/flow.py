"""Rows of the catalogue: flow matching, its training, its sampling in few steps.

Stability: internal.
"""

from jaxinfer.catalogue.entry import Method, Paper

METHODS: tuple[Method, ...] = (
    # The base: a model, its objective, how it is sampled from and steered.
    Method(
        name="flow-matching",
        family="flow",
        title="latent flow matching: the velocity of straight paths from noise to latents",
        guarantee="approximate",
        entry="jaxinfer.flow.objective:FlowMatching",
        paper=Paper("Dao, Phung, Nguyen, Tran", 2023, "2307.08698"),
        cli="train flow",
    ),
    Method(
        name="flow-model",
        family="flow",
        title="a diffusion transformer and its autoencoder: sampled, inverted, painted with",
        guarantee="approximate",
        entry="jaxinfer.flow.model:FlowModel",
        cli="sample",
    ),
    Method(
        name="classifier-free-guidance",
        family="flow",
        title="the condition strengthened, at all times or in an interval",
        guarantee="a different model",
        entry="jaxinfer.flow.guide:guided",
        paper=Paper("Ho, Salimans", 2022, "2207.12598"),
        cli="sample --guidance",
    ),
    Method(
        name="adaptive-solver",
        family="flow",
        title="Dormand-Prince with error control a row: sampling, inversion, likelihood",
        guarantee="approximate",
        entry="jaxinfer.flow.adaptive:dopri5",
        paper=Paper("Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud", 2018, "1810.01367"),
        cli="sample --solver dopri5",
    ),
    Method(
        name="flow-inpainting",
        family="flow",
        title="holes and label maps beside the noisy latent",
        guarantee="approximate",
        entry="jaxinfer.flow.inpaint:inpainting_condition",
        paper=Paper("Dao, Phung, Nguyen, Tran", 2023, "2307.08698"),
        cli="edit --mask",
    ),
    Method(
        name="inversion-editing",
        family="flow",
        title="back under one condition, forward under another",
        guarantee="approximate",
        entry="jaxinfer.flow.inversion:edit",
        paper=Paper("Song, Meng, Ermon", 2020, "2010.02502"),
        cli="edit --to",
    ),
)
