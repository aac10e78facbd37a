"""The house's law, held by reading the sources: floors, listed packages, docstrings, file lengths, methods."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxinfer import catalogue

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.smoke

PACKAGE_DIRS = {
    "jaxinfer": ROOT / "jaxinfer",
    "jaxinfer.pallas_kernels": ROOT / "pallas_kernels",
    "jaxinfer.sharding": ROOT / "sharding",
    "jaxinfer.train": ROOT / "train",
}
# A module imports from its own floor or from floors below it. jaxinfer/cli is on top: there everything meets.
FLOORS = [
    {"errors", "catalogue", "host_memory"},
    {"pallas_kernels"},
    {"measure"},
    {"ops"},
    {"cache", "quant", "checkpoint"},
    {"models"},
    {"decode", "diffusion", "flow", "batch", "evals"},
    {"sharding"},
    {"train"},
    {"cli", "__main__"},
]
# Floors that must be useful on their own: all that their files may import from elsewhere. numpy comes with jax.
ONLY = {
    "pallas_kernels": {"jax", "jaxlib", "numpy"},
    "measure": {"jax", "numpy"},
    "errors": set(),
    "catalogue": set(),
    "host_memory": set(),
}
# Folders in which a file is a method, unless its stability is `internal` or it is machinery that users touch.
METHOD_FOLDERS = ("cache", "quant", "decode", "diffusion", "flow")
MACHINERY = {
    "cache": {"base"},
    "decode": {"compiler", "config", "drafter", "emit", "keys", "language_model", "logprobs", "loop", "stream", "text"}
    | {"pearl_devices", "types"},
    "quant": {"adapter", "apply", "serialize", "tree"},
    "flow": {"types"},
}
LONGEST = 500


def name_of(path: Path, package: str) -> str:
    parts = path.relative_to(PACKAGE_DIRS[package]).with_suffix("").parts
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


MODULES = {
    name_of(path, package): path
    for package, folder in PACKAGE_DIRS.items()
    for path in sorted(folder.rglob("*.py"))
    if "assets" not in path.parts
}
SOURCES = sorted(
    path for folder in ("jaxinfer", "pallas_kernels", "sharding", "train", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
)  # fmt: skip


def imports(tree: ast.AST, module: str, is_package: bool) -> list[str]:
    """The absolute names that a module imports; `from a import b` gives `a.b`, a module or a name in one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join(up + ([base] if base else []))
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def floor_of(name: str) -> int | None:
    """The floor of `jaxinfer.x...`, None for a name of jaxinfer itself such as `jaxinfer.load`."""
    room = name.split(".")[1] if "." in name else ""
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms), None)


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module's imports break of the law."""
    room, own, bad = module.split(".")[1], floor_of(module), []
    if own is None:
        return [f"{module} stands on no floor: give {room} one in tests/test_house.py"]
    for name in imports(ast.parse(source), module, is_package):
        top = name.split(".")[0]
        if top in ("train", "sharding", "pallas_kernels", "scripts", "tests"):
            bad.append(f"{module} imports {name}: write jaxinfer.{name}")
        elif ".nnx" in name and top == "flax":
            bad.append(f"{module} imports {name}: flax.nnx is not used here")
        elif top == "jaxinfer":
            floor = floor_of(name)
            if name.split(".")[1:2] == [room]:
                continue
            if room == "pallas_kernels":
                bad.append(f"{module} imports {name}: the kernels import jax only")
            elif floor is not None and floor > own:
                bad.append(f"{module} imports {name}, which is upstairs")
            elif floor is None and name != "jaxinfer.__version__" and room not in FLOORS[-1]:
                bad.append(f"{module} imports {name}: import from where it is defined")
        elif room in ONLY and top not in ONLY[room] and top not in sys.stdlib_module_names:
            bad.append(f"{module} imports {name}: {room} imports {sorted(ONLY[room])} only")
    return bad


def test_import_law():
    bad = []
    for module, path in MODULES.items():
        if module != "jaxinfer":
            bad += breaches(path.read_text(), module, path.name == "__init__.py")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxinfer.ops.x", "from jaxinfer.models import step"),
        ("jaxinfer.ops.x", "from jaxinfer import models"),
        ("jaxinfer.ops.x", "def f():\n    import jaxinfer.cache.base"),
        ("jaxinfer.ops.x", "from ..decode import loop"),
        ("jaxinfer.decode.x", "from jaxinfer import sharding"),
        ("jaxinfer.decode.x", "import jaxinfer.cli.main"),
        ("jaxinfer.train.x", "import sharding"),
        ("jaxinfer.models.x", "from flax import nnx"),
        ("jaxinfer.pallas_kernels.x", "from jaxinfer.errors import InputError"),
        ("jaxinfer.pallas_kernels.x", "import flax"),
        ("jaxinfer.measure.x", "import flax.linen"),
        ("jaxinfer.attic.x", ""),
    ],
)
def test_import_law_catches(module, source):
    """Negative controls: each of these breaks the law, and the check says so."""
    assert len(breaches(source, module)) == 1


def test_import_law_allows():
    source = "import numpy\nfrom jaxinfer.ops import weights\nfrom jaxinfer.errors import InputError\nfrom . import a"
    assert breaches(source, "jaxinfer.cache.x") == []


def test_no_bare_imports_of_root_folders():
    """A top-level `train` would be the user's own train.py; ours is jaxinfer.train."""
    bad = []
    for path in SOURCES:
        for name in imports(ast.parse(path.read_text()), "", False):
            if name.split(".")[0] in ("train", "sharding", "pallas_kernels"):
                bad.append(f"{path.relative_to(ROOT)}: {name}")
    assert not bad, bad


def test_packages_are_the_folders():
    """The packages that the wheel installs are the folders that hold modules, no more and no less."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {m if path.name == "__init__.py" else m.rpartition(".")[0] for m, path in MODULES.items()}
    assert sorted(listed) == sorted(folders)
    assert len(listed) == len(set(listed))
    no_init = [folder for folder in folders if folder not in MODULES]
    assert not no_init, f"no __init__.py: {no_init}"


def test_every_module_imports():
    for module in MODULES:
        if not module.endswith("__main__"):
            importlib.import_module(module)


def test_import_is_lazy():
    """`import jaxinfer.pallas_kernels` and `jaxinfer.measure` bring in jax and what jax needs, and nothing else."""
    code = (
        "import sys, jaxinfer; assert 'jax' not in sys.modules, 'jaxinfer imports jax'\n"
        "import jaxinfer.pallas_kernels, jaxinfer.measure\n"
        "tops = {m.split('.')[0] for m in sys.modules}\n"
        "bad = tops & {'flax', 'optax', 'orbax', 'chex', 'tokenizers', 'typer', 'rich', 'torch', 'transformers'}\n"
        "ours = {m for m in sys.modules if m.startswith('jaxinfer.')}\n"
        "bad |= {m for m in ours if m.split('.')[1] not in ('pallas_kernels', 'measure', 'errors')}\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_docstrings():
    """Every module says what it is and how stable it is."""
    bad = []
    for module, path in MODULES.items():
        lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        if not lines or len(lines[0]) < 20:
            bad.append(f"{module}: the docstring's first line says what the file is")
        elif not re.fullmatch(r"Stability: (stable|experimental|internal)\.", lines[-1]):
            bad.append(f"{module}: the docstring's last line is 'Stability: stable|experimental|internal.'")
    assert not bad, "\n".join(bad)


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    long = {path: n for path, n in lengths.items() if n > LONGEST}
    assert not long, f"over {LONGEST} lines: {long}"


def test_suppressions_name_what_they_suppress():
    """`# type: ignore` and its like name the complaint that they silence."""
    pattern = re.compile(r"#\s*(type: ignore|pyright: ignore|noqa)(?![\[:])")
    bad = [
        f"{path.relative_to(ROOT)}:{i}"
        for path in SOURCES
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line) and path != Path(__file__)
    ]
    assert not bad, bad


@pytest.mark.parametrize("method", catalogue.METHODS, ids=lambda m: m.name)
def test_catalogue_entry(method):
    """The entry point exists, and the file that defines it cites the paper."""
    module, _, attribute = method.entry.partition(":")
    entry = getattr(importlib.import_module(module), attribute)
    assert callable(entry) or entry is not None
    if method.paper is not None and method.paper.arxiv is not None:
        assert method.paper.arxiv in MODULES[module].read_text(), f"{module} does not cite arXiv {method.paper.arxiv}"


def test_catalogue_names():
    names = [m.name for m in catalogue.METHODS]
    assert len(names) == len(set(names))
    assert all(catalogue.by_name(name).name == name for name in names)
    with pytest.raises(ValueError, match="no method 'ringg'.*ring"):
        catalogue.by_name("ringg")


def test_every_method_file_is_catalogued():
    listed = {m.entry.partition(":")[0] for m in catalogue.METHODS}
    machinery = {f"jaxinfer.{folder}.{name}" for folder, names in MACHINERY.items() for name in names}
    files = {
        module
        for module, path in MODULES.items()
        if module.count(".") > 1 and module.split(".")[1] in METHOD_FOLDERS and path.name != "__init__.py"
        if not path.read_text().split('"""')[1].endswith("Stability: internal.\n")
    }
    missing = files - listed - machinery
    assert not missing, f"neither in jaxinfer/catalogue nor in MACHINERY here: {sorted(missing)}"
    assert not machinery - files, f"MACHINERY names files that are gone or internal: {sorted(machinery - files)}"
    assert not machinery & listed, f"both a method and machinery: {sorted(machinery & listed)}"
