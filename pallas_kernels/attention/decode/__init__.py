"""Decode attention: one to a few queries against a long cache of ragged rows, kept as floats or as int8 or int4 codes.

Stability: experimental.
"""

from jaxinfer.pallas_kernels.attention.decode.api import decode
from jaxinfer.pallas_kernels.attention.decode.codes import Codes, numbers, quantize

__all__ = ["Codes", "decode", "numbers", "quantize"]
