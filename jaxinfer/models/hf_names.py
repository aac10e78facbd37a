"""How each of our params stands in a Hugging Face checkpoint: one table for all families, and the rows that differ.

A row maps a path in `params` to a tensor's name, and says whether it is stored [out, in] (every linear is), is a part
of a fused tensor, or is one of many tensors that we stack (experts). `{i}` is the layer, `{e}` the expert.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """Where one param lies. `transpose`: stored [out, in]. `fused`: our names of its row blocks, in order."""

    name: str
    transpose: bool = False
    fused: tuple[str, ...] = ()

    @property
    def stacked(self) -> bool:
        """One tensor an expert."""
        return "{e}" in self.name


def _layer(name: str, transpose: bool = False, fused: tuple[str, ...] = ()) -> Row:
    return Row(f"model.layers.{{i}}.{name}", transpose, fused)


TABLE: Mapping[str, Row] = {
    "embedding": Row("model.embed_tokens.weight"),
    "position_embedding": Row("model.embed_positions.weight"),
    "position_table": Row("model.relative_attention_bias.weight"),
    "final_norm": Row("model.norm.weight"),
    "head": Row("lm_head.weight", transpose=True),
    "input_norm": _layer("input_layernorm.weight"),
    "post_attention_norm": _layer("post_attention_layernorm.weight"),
    "pre_mlp_norm": _layer("pre_feedforward_layernorm.weight"),
    "post_mlp_norm": _layer("post_feedforward_layernorm.weight"),
    "attention/q_norm": _layer("self_attn.q_norm.weight"),
    "attention/k_norm": _layer("self_attn.k_norm.weight"),
    **{f"attention/{x}": _layer(f"self_attn.{x}_proj.weight", True) for x in "qkvo"},
    **{f"attention/{x}_bias": _layer(f"self_attn.{x}_proj.bias") for x in "qkvo"},
    **{f"mlp/{x}": _layer(f"mlp.{x}_proj.weight", True) for x in ("gate", "up", "down")},
    **{f"mlp/{x}_bias": _layer(f"mlp.{x}_proj.bias") for x in ("gate", "up", "down")},
    "experts/router": _layer("mlp.gate.weight", True),
    **{f"experts/{x}": _layer(f"mlp.experts.{{e}}.{x}_proj.weight", True) for x in ("gate", "up", "down")},
}

_QKV = ("attention/q", "attention/k", "attention/v")
_GATE_UP = ("mlp/gate", "mlp/up")

DIFFERENT: Mapping[str, Mapping[str, Row]] = {
    "phi3": {
        **dict.fromkeys(_QKV, _layer("self_attn.qkv_proj.weight", True, _QKV)),
        **dict.fromkeys(_GATE_UP, _layer("mlp.gate_up_proj.weight", True, _GATE_UP)),
    },
    "mixtral": {
        "experts/router": _layer("block_sparse_moe.gate.weight", True),
        "experts/gate": _layer("block_sparse_moe.experts.{e}.w1.weight", True),
        "experts/up": _layer("block_sparse_moe.experts.{e}.w3.weight", True),
        "experts/down": _layer("block_sparse_moe.experts.{e}.w2.weight", True),
    },
}

# Tensors that say nothing the config does not, and the towers of multi-modal checkpoints, of which we take the text.
_IGNORED = re.compile(r".*rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*")
_NESTED = re.compile(r"^(model\.language_model|language_model\.model)\.")


@dataclasses.dataclass(frozen=True)
class Place:
    """One of our params and the tensors that hold it: `rows` is its block of a fused tensor's output rows."""

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    transpose: bool
    rows: tuple[int, int] | None
    stored: tuple[int, ...]  # shape of each named tensor

    @property
    def stacked(self) -> bool:
        """Whether the param is a stack of tensors, one an expert."""
        return len(self.shape) > len(self.stored)


def places(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
    """Where each param of `shapes` (path "layers_0/mlp/gate" to shape) stands in a checkpoint of this family."""
    return [_place(config, path, shapes) for path in shapes]


def _place(config: ModelConfig, path: str, shapes: Mapping[str, tuple[int, ...]]) -> Place:
    prefix, layer, key = _split(path, config)
    row = DIFFERENT.get(config.family, {}).get(key) or TABLE.get(key)
    if row is None:
        raise ConfigError(f"param {path!r} has no place in a Hugging Face checkpoint; known: {', '.join(TABLE)}")
    shape = tuple(shapes[path])
    name = row.name.replace("{i}", str(layer))
    one = shape[1:] if row.stacked else shape
    stored = tuple(reversed(one)) if row.transpose else one
    names = tuple(name.replace("{e}", str(e)) for e in range(shape[0])) if row.stacked else (name,)
    if not row.fused:
        return Place(path, shape, names, row.transpose, None, stored)
    sizes = [shapes[prefix + other][-1] for other in row.fused]
    begin = sum(sizes[: row.fused.index(key)])
    return Place(path, shape, names, row.transpose, (begin, begin + shape[-1]), (sum(sizes), *stored[1:]))


def _split(path: str, config: ModelConfig) -> tuple[str, int, str]:
    """ "layers_3/mlp/gate" -> ("layers_3/", 3, "mlp/gate"), or "experts/gate" where layer 3 is sparse."""
    found = re.fullmatch(r"(layers_(\d+)/)(.*)", path)
    if found is None:
        return "", 0, path
    prefix, layer, key = found[1], int(found[2]), found[3]
    return prefix, layer, re.sub("^mlp/", "experts/", key) if config.is_sparse(layer) else key


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Canonical name -> name in the file. Multi-modal checkpoints keep their language model under one more prefix."""
    kept = (name for name in names if not _IGNORED.fullmatch(name))
    return {_NESTED.sub("model.", name).replace("language_model.lm_head", "lm_head"): name for name in kept}
