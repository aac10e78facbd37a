"""Import every module of an installed jaxinfer, away from its sources: python check_wheel.py

Run it by an interpreter that has the wheel, from another directory than the checkout. Prints the number of modules;
fails if a module does not import or comes from somewhere else than the installed package, or if data are missing.
"""

import importlib
import pkgutil
import sysconfig
from pathlib import Path

import jaxinfer


def main() -> None:
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
    if not Path(str(jaxinfer.__file__)).with_name("py.typed").exists():
        raise SystemExit("py.typed is not in the wheel")
    print(f"{len(names)} modules of jaxinfer {jaxinfer.__version__} import from {site.name}")


if __name__ == "__main__":
    main()
