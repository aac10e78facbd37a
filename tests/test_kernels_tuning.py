"""Block choice: the table of the device where it has the call's bucket, else the op's own rule."""

import json

import jax
import pytest

from jaxinfer.pallas_kernels._core import tuning
from jaxinfer.pallas_kernels._core.targets import TARGETS


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """An H200's table with one entry."""
    (tmp_path / "nvidia_h200.json").write_text(json.dumps({"flash": {"bfloat16": {"2048x2048x64": [128, 64]}}}))
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    tuning._table.cache_clear()
    yield
    tuning._table.cache_clear()


def rule():
    return 1, 2


@pytest.mark.smoke
def test_table_then_rule(tables):
    def block(op="flash", dtype="bfloat16", sizes=(2000, 1025, 64), device="NVIDIA H200"):
        return tuning.block(op, dtype, sizes, rule, device=device)

    assert block() == (128, 64)
    assert block(sizes=(2049, 2048, 64)) == rule(), "the next bucket"
    assert block(op="decode") == block(dtype="float32") == block(device="cpu") == rule()
    sizes = (2000, 1025, 64)
    for serves, want in ((lambda block: block[1] < 100, (128, 64)), (lambda block: block[1] > 100, rule())):
        assert tuning.block("flash", "bfloat16", sizes, rule, device="NVIDIA H200", serves=serves) == want


def test_the_device_is_the_one_that_is_traced_for(tables):
    assert tuning.device_kind() == jax.devices()[0].device_kind
    with jax.sharding.use_abstract_mesh(TARGETS["h200"].mesh()):
        assert tuning.block("flash", "bfloat16", (2048, 2048, 64), rule) == (128, 64)
        assert tuning.device_for("NVIDIA H100") == "NVIDIA H200", "the device itself goes before its make"
        assert tuning.device_for("TPU") == "TPU"


def test_buckets():
    assert tuning.bucket((1, 2, 3, 64, 65)) == "1x2x4x64x128"


def test_the_tables_in_the_package_have_the_form_that_is_read():
    for path in tuning.TABLES.glob("*.json"):
        for op, dtypes in json.loads(path.read_text()).items():
            for dtype, buckets in dtypes.items():
                for bucket, block in buckets.items():
                    sizes = [int(n) for n in bucket.split("x")]
                    assert tuning.bucket(sizes) == bucket, f"{path.name} {op} {dtype} {bucket} is no bucket"
                    assert all(type(n) is int and n > 0 for n in block)
