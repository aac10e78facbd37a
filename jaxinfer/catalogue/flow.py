"""Rows of the catalogue: flow matching, its training, its sampling in few steps.

Stability: internal.
"""

from jaxinfer.catalogue.entry import Method

METHODS: tuple[Method, ...] = ()
