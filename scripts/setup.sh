#!/usr/bin/env bash
# Makes .venv, if there is none, and installs jaxinfer into it: scripts/setup.sh [EXTRAS]
#   scripts/setup.sh dev,plot          the pinned versions of constraints.txt
#   PYTHON=python3.12 VENV=.venv312 scripts/setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-plot}
venv=${VENV:-.venv}
python=${PYTHON:-python3}

if [ ! -x "$venv/bin/python" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "jaxinfer needs Python 3.11 or newer; $python is $("$python" --version). Name another: PYTHON=python3.12 $0" >&2; exit 2; }
  "$python" -m venv "$venv"
fi
echo "installing jaxinfer[$extras] into $venv" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]" -c constraints.txt
