#!/usr/bin/env bash
# Installs jaxinfer into .venv (made if there is none) and runs the tests, the slow ones left out: scripts/test.sh [PYTEST OPTIONS]
#   Under ten minutes on two cores, the installation aside. PYTHON=python3.12 picks the interpreter of a new .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev,plot,data
exec "${VENV:-.venv}/bin/pytest" -m "not slow" --durations=15 "$@"
