#!/usr/bin/env bash
# Shows jaxinfer at work on a machine that has only Python (3.11 or newer) and git, in about two minutes, installation
# aside: makes .venv, installs, continues Python code with the shipped model, then times plain decoding beside
# accelerated decoding of the same prompts. An exact method gives the same tokens; where one is slower, the table says so.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh

run() {
  echo
  echo "\$ jaxinfer ${*@Q}"
  "${VENV:-.venv}/bin/jaxinfer" "$@"
}

run generate --prompt 'def read_json(path):' --max-tokens 96 --temperature 0.7 --top-p 0.95 --seed 1
run compare --methods plain,draft:gamma=2,draft:gamma=4 --max-tokens 128
