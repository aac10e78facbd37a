"""Operations that models and caches share: weight products, attention over parts, position encodings.

Stability: experimental.
"""

from jaxinfer.ops.attention import (
    AttentionSpec,
    Bidirectional,
    Part,
    Segment,
    Segments,
    attend,
    attend_naive,
    block_visibility,
    combine,
)
from jaxinfer.ops.position import Alibi, Rope, T5Bias, sinusoid
from jaxinfer.ops.precision import sum_dtype, widen
from jaxinfer.ops.weights import (
    Rules,
    dot,
    dot_transposed,
    einsum,
    is_weight,
    materialize,
    ragged_dot,
    register,
    take,
)

__all__ = [
    "Alibi",
    "AttentionSpec",
    "Bidirectional",
    "Part",
    "Rope",
    "Rules",
    "Segment",
    "Segments",
    "T5Bias",
    "attend",
    "attend_naive",
    "block_visibility",
    "combine",
    "dot",
    "dot_transposed",
    "einsum",
    "is_weight",
    "materialize",
    "ragged_dot",
    "register",
    "sinusoid",
    "sum_dtype",
    "take",
    "widen",
]
