#!/usr/bin/env bash
# Installs what the tests need, as demo.sh does, then checks the form of the code (ruff) and all the
# rest (pytest). Arguments go to pytest, as in bash test.sh -k resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source demo.sh
prepare -r requirements-dev.txt
ruff format --check .
ruff check .
# Two tests at a time, each with one thread
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal "$@"
