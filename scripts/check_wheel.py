"""Import every module of an installed jaxinfer, away from its sources: python check_wheel.py SOURCE

Run it by an interpreter that has the wheel, from another directory than the checkout; SOURCE is the checkout's jaxinfer
folder. Prints the number of modules; fails if a module does not import or comes from somewhere else than the installed
package, or if a data file of SOURCE (py.typed, the shipped models) was not installed as it is.
"""

import filecmp
import importlib
import pkgutil
import sys
import sysconfig
from pathlib import Path

import jaxinfer


def main(source: Path) -> None:
    site = Path(sysconfig.get_path("purelib")).resolve()
    names = ["jaxinfer", *(m.name for m in pkgutil.walk_packages(jaxinfer.__path__, "jaxinfer."))]
    for name in names:
        if name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        if site not in Path(str(module.__file__)).resolve().parents:
            raise SystemExit(f"{name} comes from {module.__file__}, not from {site}")
    for package in ("jaxinfer.pallas_kernels", "jaxinfer.sharding", "jaxinfer.train"):
        if package not in names:
            raise SystemExit(f"{package} is not in the wheel")
    files = [path for path in source.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    for path in files:
        installed = site / "jaxinfer" / path.relative_to(source)
        if not installed.exists() or not filecmp.cmp(path, installed, shallow=False):
            raise SystemExit(f"{path} is not in the wheel as it is")
    print(f"jaxinfer {jaxinfer.__version__}: {len(names)} modules import, {len(files)} data files are there")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
