"""The one configuration of the one decoder: every family is a value of it.

`position` chooses among the encodings that Kazemnejad et al. 2023 (2305.19466) compare, none at all among them (NoPE:
the causal mask alone tells a decoder where a token stands).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

from jaxinfer.errors import ConfigError
from jaxinfer.ops.attention import AttentionSpec
from jaxinfer.ops.position import Alibi, Rope, T5Bias

POSITIONS = ("rope", "alibi", "t5", "learned", "sinusoidal", "none")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Frozen and hashable: it is the static part of every compiled program.

    `windows` and `ropes` hold one entry a layer (None: full attention; no rotation). `max_length` is the longest
    position range that will be served; RoPE scalings that depend on a length (dynamic, longrope) take it from here.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_length: int
    family: str = "llama"
    activation: str = "silu"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    sandwich_norms: bool = False
    embedding_scale: float | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    position: str = "rope"
    windows: tuple[int | None, ...] = ()
    ropes: tuple[Rope | None, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    normalize_experts: bool = True
    dense_layers: tuple[int, ...] = ()
    bos: int | None = None
    eos: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.position not in POSITIONS:
            raise ConfigError(f"position encoding {self.position!r} is not known; known: {', '.join(POSITIONS)}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation {self.activation!r} is not known; known: {', '.join(ACTIVATIONS)}")
        for name in ("windows", "ropes"):
            if getattr(self, name) and len(getattr(self, name)) != self.num_layers:
                raise ConfigError(f"{name} has {len(getattr(self, name))} entries for {self.num_layers} layers")
        if self.num_experts and not 0 < self.experts_per_token <= self.num_experts:
            raise ConfigError(f"experts_per_token {self.experts_per_token} must be 1 to {self.num_experts}")

    def attention(self, layer: int) -> AttentionSpec:
        """The attention arithmetic of one layer."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        window = self.windows[layer] if self.windows else None
        return AttentionSpec(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            scale,
            self._position(layer),
            window,
            self.attention_softcap,
        )

    def _position(self, layer: int) -> Rope | Alibi | T5Bias | None:
        match self.position:
            case "rope" if self.ropes:
                rope = self.ropes[layer]
                return None if rope is None else dataclasses.replace(rope, length=self.max_length)
            case "rope":
                return Rope(self.head_dim, length=self.max_length)
            case "alibi":
                return Alibi(self.num_heads)
            case "t5":
                return T5Bias(self.num_heads)
            case _:
                return None

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers
