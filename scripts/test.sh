#!/usr/bin/env bash
# Installs jaxinfer into .venv (made if there is none) and runs the tests, the slow ones left out: scripts/test.sh [PYTEST OPTIONS]
#   Under ten minutes on two cores, the installation aside: a process a core, each with whole files, so that what a file
#   compiles once is compiled once. -n 0 runs in one process, for --pdb. PYTHON=python3.12 picks a new .venv's interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev,plot,data,flow
exec "${VENV:-.venv}/bin/pytest" -n auto --dist loadfile -m "not slow" --durations=15 "$@"
