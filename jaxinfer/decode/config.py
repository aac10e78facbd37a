"""`Config`: everything static about a decoding run.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

from jaxinfer.decode.autoregressive import Autoregressive
from jaxinfer.decode.sampling import Features, Processor, Sampling, check_range
from jaxinfer.decode.types import Drafter, Step, Verifier
from jaxinfer.decode.verify import Chain, Greedy
from jaxinfer.decode.verify_tree import Tree
from jaxinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Config:
    """Static part of a run; frozen and hashable, so it is a static argument of `jax.jit`.

    The sampling values are the defaults of every row; to vary them by row, or without a new compilation, pass a
    `Sampling` to `generate` or `start` (then `features` says what to compile for; None: everything). Temperature 0 is
    greedy. `max_tokens` also bounds the output buffers. `eos` None takes the model's own (`end_tokens`); `()` ignores
    end tokens. `n` samples a prompt. `logprobs`: None, or how many most likely tokens to report beside the chosen one;
    they are log-softmax of the model's own logits, before bias, penalties and temperature. `verifier` None: the
    drafter's own where it needs one; else greedy where no row samples, and where one does rejection sampling along a
    chain, or the tree's rule for trees.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    eos: tuple[int, ...] | None = None
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    drafter: Drafter = Autoregressive()
    verifier: Verifier | None = None
    processors: tuple[Processor, ...] = ()
    features: Features | None = None
    prefill_chunk: int = 256

    def __post_init__(self):
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                     "frequency_penalty", "min_tokens", "max_tokens"):  # fmt: skip
            check_range(name, getattr(self, name))
        for name, low in (("n", 1), ("prefill_chunk", 1), ("max_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name}: got {value!r}, accepts an integer of {low} or more")
        if self.logprobs is not None and not 0 <= self.logprobs:
            raise ConfigError(f"logprobs: got {self.logprobs!r}, accepts None or a count of 0 or more")

    def sampling(self, batch: int, eos: tuple[int, ...] = ()) -> Sampling:
        """The defaults as a Sampling of `batch` rows; `eos` is used where the config names none."""
        bias = (*self.logit_bias, *((token, float("-inf")) for token in self.banned))
        return Sampling.make(
            batch,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            min_tokens=self.min_tokens,
            max_tokens=self.max_tokens,
            bias_ids=[token for token, _ in bias],
            bias_values=[value for _, value in bias],
            forced=self.forced,
            eos=eos if self.eos is None else self.eos,
        )

    def features_for(self, *, own: bool) -> Features:
        """What to compile for: `own` says that the rows use this config's values, not a Sampling of the caller's."""
        if self.features is not None:
            return self.features
        if not own:
            return Features.everything()
        warm = self.temperature > 0
        return Features(
            sample=warm,
            top_k=warm and self.top_k > 0,
            top_p=warm and self.top_p < 1,
            min_p=warm and self.min_p > 0,
            penalties=(self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0),
            bias=bool(self.logit_bias or self.banned),
            min_tokens=self.min_tokens > 0,
            forced=bool(self.forced),
        )

    def verifier_for(self, features: Features, *, chain: bool) -> Verifier:
        """The verifier in use for proposals that are chains, or trees."""
        own = self.verifier or getattr(self.drafter, "verifier", None)
        if own is not None:
            if features.sample and getattr(own, "greedy_only", False):
                name = type(own).__name__
                raise ConfigError(
                    f"{name} decodes greedily: got rows that may sample, accepts temperature 0 in all rows"
                )
            return own
        return (Chain() if chain else Tree()) if features.sample else Greedy()


def end_tokens(step: Step) -> tuple[int, ...]:
    """The model's own end tokens, `step.eos`; none where a brought model has no such attribute."""
    return getattr(step, "eos", ())
