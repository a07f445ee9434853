#!/usr/bin/env bash
# Prepares as demo.sh does, then checks the code's form (ruff) and everything else (pytest). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source demo.sh
prepare -r requirements-dev.txt
ruff format --check .
ruff check .
python -m pytest "$@"
