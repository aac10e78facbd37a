"""The README holds what it says: its method table is the catalogue, its files exist, and its Python code runs."""

import doctest
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_method_table_is_up_to_date():
    with_table = runpy.run_path(str(ROOT / "scripts/make_readme.py"))["with_table"]
    assert with_table(README) == README, "run python scripts/make_readme.py"
    assert with_table(README.replace("| dense ", "| dence ")) == README  # the check sees a wrong row


def test_named_files_exist():
    """Every relative link and every scripts/ path that the README names is there."""
    named = re.findall(r"\]\((?!http|#)([^)#]+)", README) + re.findall(r"\bscripts/\w+\.(?:sh|py)\b", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named and not missing, missing


def python_blocks() -> list[str]:
    """The fenced Python blocks, in order."""
    return re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_python_code_runs(tmp_path, monkeypatch):
    """The blocks run one after the other in one namespace; one with `>>>` is a doctest, and its output is compared."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    assert python_blocks()
    for block in python_blocks():
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, names, "README", "README.md", 0)
            report: list[str] = []
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            runner.run(test, out=report.append, clear_globs=False)
            names.update(test.globs)
            assert not runner.failures, "".join(report)
        else:
            exec(compile(block, "README.md", "exec"), names)
