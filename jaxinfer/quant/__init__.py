"""Weight formats and adapters: params leaves that are not arrays, and the recipes that put them there.

Importing this package registers the leaf types with `jaxinfer.ops`.

Stability: experimental.
"""

from jaxinfer.quant.apply import Spec, apply, bits_per_weight, materialize, relative_error
from jaxinfer.quant.extended import ExtendedRows
from jaxinfer.quant.int8 import Int8, QuantizedArray
from jaxinfer.quant.lora import LoraArray, adapters, attach, detach, lora, merge, unmerge
from jaxinfer.quant.serialize import flatten, unflatten
from jaxinfer.quant.tree import leaves, map_axes, map_leaves, near, stored

__all__ = [
    "ExtendedRows",
    "Int8",
    "LoraArray",
    "QuantizedArray",
    "Spec",
    "adapters",
    "apply",
    "attach",
    "bits_per_weight",
    "detach",
    "flatten",
    "leaves",
    "lora",
    "map_axes",
    "map_leaves",
    "materialize",
    "merge",
    "near",
    "relative_error",
    "stored",
    "unflatten",
    "unmerge",
]
