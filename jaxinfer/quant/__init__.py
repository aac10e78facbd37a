"""Weight formats and adapters: params leaves that are not arrays, and the recipes that put them there.

Importing this package registers the leaf types with `jaxinfer.ops`.

Stability: experimental.
"""

from jaxinfer.quant.adapter import AdapterSpec, adapt, adapters, attach, detach, is_adapter, join, merge, split, unmerge
from jaxinfer.quant.apply import Spec, apply, bits_per_weight, materialize, relative_error
from jaxinfer.quant.extended import ExtendedRows
from jaxinfer.quant.floats import Fp6, Fp8, MxFp4, NvFp4
from jaxinfer.quant.hydra import Hydra, HydraArray
from jaxinfer.quant.integers import Int2, Int3, Int4, Int8
from jaxinfer.quant.lora import Lora, LoraArray, lora
from jaxinfer.quant.mixed_rows import Mixed, MixedRows
from jaxinfer.quant.paca import Paca, PacaArray
from jaxinfer.quant.quantized import QuantizedArray
from jaxinfer.quant.serialize import flatten, unflatten
from jaxinfer.quant.soka import Soka, SokaArray
from jaxinfer.quant.ternary import Ternary
from jaxinfer.quant.transposed import Transposed, TransposedArray
from jaxinfer.quant.tree import build, leaves, map_axes, map_leaves, near, stored
from jaxinfer.quant.trit_planes import SumArray, TritPlanes

__all__ = [
    "AdapterSpec",
    "ExtendedRows",
    "Fp6",
    "Fp8",
    "Hydra",
    "HydraArray",
    "Int2",
    "Int3",
    "Int4",
    "Int8",
    "Lora",
    "LoraArray",
    "Mixed",
    "MixedRows",
    "MxFp4",
    "NvFp4",
    "Paca",
    "PacaArray",
    "QuantizedArray",
    "Soka",
    "SokaArray",
    "Spec",
    "SumArray",
    "Ternary",
    "Transposed",
    "TransposedArray",
    "TritPlanes",
    "adapt",
    "adapters",
    "apply",
    "attach",
    "bits_per_weight",
    "build",
    "detach",
    "flatten",
    "is_adapter",
    "join",
    "leaves",
    "lora",
    "map_axes",
    "map_leaves",
    "materialize",
    "merge",
    "near",
    "relative_error",
    "split",
    "stored",
    "unflatten",
    "unmerge",
]
