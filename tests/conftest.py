"""What every test runs under: eight virtual CPU devices, full-precision products, a skip where something is lacking."""

import importlib.util

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


def lacking(item: pytest.Item) -> str | None:
    """What a marked test needs and this machine does not have."""
    if item.get_closest_marker("parity"):
        for name in ("torch", "transformers"):
            if importlib.util.find_spec(name) is None:
                return f"{name} is not installed"
    for backend in ("gpu", "tpu"):
        if item.get_closest_marker(backend) and jax.default_backend() != backend:
            return f"no {backend.upper()}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := lacking(item):
            item.add_marker(pytest.mark.skip(reason=reason))
