"""Other pairs than independent ones: transport within each class of a batch, and pairs weighted by the Gibbs kernel.

Both from random weights, with the flow's number of updates. The temperature is the least whose bias of the marginals is
borne, on a thousand pairs of the training data.
"""

import functools

import jax
import numpy as np

from flow_bench.bench import Bench, Entry, Sampler, fixed
from jaxinfer.errors import ConfigError
from jaxinfer.flow import gibbs
from jaxinfer.flow.objective import FlowMatching
from jaxinfer.flow.optimal_transport import MinibatchOT
from jaxinfer.models import autoencoder as vae

KAPPAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
STEPS = (1, 2, 4, 8, 16)


def coupling(bench: Bench, kind: str):
    """The coupling of a name, fitted to the data."""
    if kind == "minibatch transport":
        return MinibatchOT()
    rows = np.random.default_rng(0).permutation(len(bench.data.images))[:1000]
    x1 = bench.data.images[rows]
    if bench.autoencoder is not None:
        x1 = vae.encode(bench.autoencoder, bench.autoencoder_params, x1)
    x0 = jax.random.normal(jax.random.key(3), x1.shape)
    try:
        return gibbs.Gibbs(gibbs.choose_temperature(x0, jax.numpy.asarray(x1), KAPPAS))
    except ConfigError:  # no temperature is without bias: the mildest
        return gibbs.Gibbs(gibbs.temperature(KAPPAS[-1], jax.numpy.asarray(x1)))


def samplers(bench: Bench, seed: int, *, kind: str) -> list[Sampler]:
    """Euler on uniform grids."""
    objective = FlowMatching(couple=coupling(bench, kind))
    params = bench.train(kind.replace(" ", "_"), seed, objective=objective)
    return [fixed(bench.network, params, "euler", k) for k in STEPS]


ENTRIES = [
    Entry("minibatch transport", functools.partial(samplers, kind="minibatch transport")),
    Entry("gibbs weights", functools.partial(samplers, kind="gibbs weights")),
]
