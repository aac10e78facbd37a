"""torchcfm (Tong et al.), beside our own training: the same transformer in PyTorch, data, optimiser and steps.

torchcfm has no transformer, so this file has one of our network's exact shape; the path, the target and the times are
torchcfm's. Training throughput is measured in turns, ours and theirs, after both have compiled or warmed up.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import jax
import numpy as np

from flow_bench.bench import Bench
from jaxinfer.train import loop
from jaxinfer.train.lm import warmup_stable_decay

DROP, EMA = 0.1, 0.999


def available() -> bool:
    """Whether torch and torchcfm are installed, and POT (`ot`), which torchcfm imports."""
    return all(importlib.util.find_spec(name) for name in ("torch", "torchcfm", "ot"))


def _network(config: Any) -> Any:
    """A torch module `(t[B], x[B,h,w,c], labels[B]) -> v` of `config`'s layers and widths."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    d, p = config.hidden_size, config.patch
    rows, columns = config.height // p, config.width // p

    def zero(layer):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.modulation, self.qkv, self.o = zero(nn.Linear(d, 6 * d)), nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, config.mlp_ratio * d), nn.Linear(config.mlp_ratio * d, d)

        def forward(self, x, c):
            m = self.modulation(F.silu(c))[:, None].chunk(6, -1)
            h = F.layer_norm(x, (d,)) * (1 + m[1]) + m[0]
            qkv = self.qkv(h).unflatten(-1, (3, config.num_heads, d // config.num_heads)).permute(2, 0, 3, 1, 4)
            h = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
            x = x + m[2] * self.o(h)
            h = F.layer_norm(x, (d,)) * (1 + m[4]) + m[3]
            return x + m[5] * self.down(F.gelu(self.up(h), approximate="tanh"))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Linear(p * p * config.channels, d)
            self.places = nn.Parameter(0.02 * torch.randn(1, rows * columns, d))
            self.rates = nn.Parameter(config.max_frequency ** torch.linspace(0, 1, 32), requires_grad=False)
            self.time = nn.Sequential(nn.Linear(64, d), nn.SiLU(), nn.Linear(d, d))
            self.labels = nn.Embedding(config.classes + 1, d)
            self.blocks = nn.ModuleList([Block() for _ in range(config.num_layers)])
            self.modulation, self.out = zero(nn.Linear(d, 2 * d)), zero(nn.Linear(d, p * p * config.channels))

        def forward(self, t, x, labels):
            b = len(x)
            x = (
                x.reshape(b, rows, p, columns, p, config.channels)
                .permute(0, 1, 3, 2, 4, 5)
                .reshape(b, rows * columns, -1)
            )
            angles = t[:, None] * self.rates
            c = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.labels(labels)
            h = self.patches(x) + self.places
            for block in self.blocks:
                h = block(h, c)
            shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, -1)
            h = self.out(F.layer_norm(h, (d,)) * (1 + scale) + shift)
            h = h.reshape(b, rows, columns, p, p, config.channels).permute(0, 1, 3, 2, 4, 5)
            return h.reshape(b, config.height, config.width, config.channels)

    return Transformer()


class Peer:
    """torchcfm's training of that network on the benchmark's data."""

    def __init__(self, bench: Bench, seed: int = 0):
        import torch
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        torch.manual_seed(seed)
        self.bench, self.torch, self.matcher = bench, torch, ConditionalFlowMatcher(sigma=0.0)
        self.net = _network(bench.network.config)
        self.mean = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        self.optimizer = torch.optim.Adam([p for p in self.net.parameters() if p.requires_grad], lr=1e-3)
        self.data: Any = bench.recipe("flow", seed, steps=bench.settings.steps).data
        self.planned = warmup_stable_decay(
            1e-3, steps=bench.settings.steps, warmup=max(1, min(200, bench.settings.steps // 10))
        )
        self.rates = [float(r) for r in jax.device_get(jax.vmap(self.planned)(np.arange(bench.settings.steps)))]
        self.count = 0

    def step(self) -> None:
        """One update."""
        torch, bench = self.torch, self.bench
        batch = {name: torch.tensor(value) for name, value in self.data(self.count).items()}
        if bench.autoencoder is None:
            x1 = batch["images"]
        else:
            noise = torch.randn_like(batch["mean"])
            x1 = (batch["mean"] + (0.5 * batch["log_variance"]).exp() * noise) * bench.autoencoder.scale
        found: Any = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        t, x, target = found
        labels = batch["labels"].long()
        labels = torch.where(torch.rand(len(labels)) < DROP, bench.network.config.classes, labels)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[min(self.count, len(self.rates) - 1)]
        self.optimizer.zero_grad()
        (self.net(t, x, labels) - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        decay = min(EMA, (1 + self.count) / (10 + self.count))
        with torch.no_grad():
            for name, value in self.net.state_dict().items():
                self.mean[name].lerp_(value, 1 - decay)
        self.count += 1

    def sample(self, x: Any, labels: np.ndarray, steps: int) -> np.ndarray:
        """Euler with the averaged weights."""
        torch = self.torch
        self.net.load_state_dict(self.mean)
        x, labels = torch.tensor(np.asarray(x)), torch.tensor(labels).long()
        with torch.no_grad():
            for k in range(steps):
                x = x + self.net(torch.full((len(x),), k / steps), x, labels) / steps
        return x.numpy()


def speed(bench: Bench, *, rounds: int = 3, updates: int = 20) -> list[dict[str, Any]]:
    """Rows of training throughput, ours and torchcfm's in turns."""
    recipe = bench.recipe("flow", 0, steps=bench.settings.steps)
    update = jax.jit(loop.make_train_step(recipe), donate_argnums=0)
    state = [loop.init_state(bench.network.init(jax.random.key(0)), recipe, jax.random.key(1000))]
    data: Any = recipe.data

    def ours() -> None:
        for i in range(updates):
            state[0], metrics = update(state[0], data(i))
        jax.block_until_ready(metrics["loss"])

    timed = Peer(bench)

    def theirs() -> None:
        for _ in range(updates):
            timed.step()

    seconds: dict[str, list[float]] = {"jaxinfer": [], "torchcfm": []}
    for turn in range(rounds + 1):
        for name, run in (("jaxinfer", ours), ("torchcfm", theirs)):
            start = time.perf_counter()
            run()
            if turn:  # the first turn compiles
                seconds[name].append((time.perf_counter() - start) / updates)
    return [
        {"peer": name, "train_ms_per_update": 1e3 * float(np.median(s)), "rounds": rounds}
        for name, s in seconds.items()
    ]


def quality(bench: Bench, seed: int) -> list[dict[str, Any]]:
    """Rows of torchcfm's distances after all its updates, from the noise and labels that ours is measured with."""
    peer, (x, labels) = Peer(bench, seed), bench.inputs(seed=seed)
    while peer.count < bench.settings.steps:
        peer.step()
    rows = []
    for steps in (1, 4, 16, 32):
        images = bench.images(jax.numpy.asarray(peer.sample(x, labels, steps)))
        scores = {**bench.score(images, labels), **bench.fit(images, labels)}
        rows.append({"peer": "torchcfm", "sampler": "euler", "steps": steps, "seed": seed, **scores})
    return rows
