#!/usr/bin/env bash
# A full-size SD-VAE from nothing to fine-tuned, through LDM's layout, as long as a CPU affords: random weights as an LDM
# .ckpt -> trained with Eq. 1 -> exported as an LDM .ckpt -> fine-tuned with Eq. 1 (standard) and with Eq. 5 (eq), as
# many steps each. Keeps the curves of R, S and PSNR in results/sd_finetune; checkpoints (a gigabyte each) in WORK.
#
#     bash results/compare/sd_finetune.sh [PRETRAIN_STEPS=150] [TUNE_STEPS=75] [WORK=/tmp/sd_finetune]
# Run again, it goes on where it stopped.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
PRE=${1:-150} TUNE=${2:-75} WORK=${3:-/tmp/sd_finetune}
OUT=$ROOT/results/sd_finetune
mkdir -p "$WORK" "$OUT"
cd "${CODE:-$ROOT}"
VAE="python vae.py --data $ROOT/data/emoji/train --image-size 64 --batch-size 2 --lpips-weight 0 --lr 1e-4 --seed 0
     --latent-scale published --log-every 5 --sample-every 10 --save-every 1000"

[ -e "$WORK/random.ckpt" ] || python - "$WORK/random.ckpt" <<'PY'
import sys, torch, vae
torch.manual_seed(0)
torch.save(dict(state_dict=vae.AutoencoderKL(**vae.CONFIGS["sd"]).state_dict()), sys.argv[1])
PY
$VAE --init "$WORK/random.ckpt" --model sd --p-alpha 1 --gan-weight 0 --steps "$PRE" --out "$WORK/pretrain.pt"
[ -e "$WORK/pretrained" ] || python vae.py --init "$WORK/pretrain.pt" --export "$WORK/pretrained" --layout ldm
for arm in "standard 1" "eq 0.5"; do
  set -- $arm
  $VAE --init "$WORK/pretrained/model.ckpt" --model sd --p-alpha "$2" --gan-weight 0.5 --disc-start 25 --steps "$TUNE" \
    --out "$WORK/$1.pt"
done
cp "$WORK"/{pretrain,standard,eq}.jsonl "$OUT"

python - "$OUT" "$WORK" "$PRE" "$TUNE" <<'PY'
import json, platform, sys
from pathlib import Path
import matplotlib
import torch, vae
matplotlib.use("Agg")
import matplotlib.pyplot as plt
out, work, pre, tune = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
logs = {name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pretrain", "standard", "eq")}
curves = {name: [record for record in log if "R" in record] for name, log in logs.items()}
figure, axes = plt.subplots(1, 3, figsize=(12, 3.2))
for axis, key in zip(axes, ("R", "S", "PSNR")):
    for name, records in curves.items():
        axis.plot([r["step"] + pre * (name != "pretrain") for r in records], [r[key] for r in records], "o-", label=name)
    axis.set(title=key, xlabel="step")
axes[0].legend()
figure.tight_layout()
figure.savefig(out / "curve.png", dpi=110)
args = vae.read_file(work / "eq.pt")["args"]
record = dict(command=f"bash results/compare/sd_finetune.sh {pre} {tune}", steps=dict(pretrain=pre, standard=tune, eq=tune),
              images_a_step=2, image_size=64, data="data/emoji/train", lr=args["lr"], seed=args["seed"], precision=args["precision"],
              seconds={name: round(sum(r.get("seconds", 0) for r in log)) for name, log in logs.items()}, torch=torch.__version__, device=f"CPU, {torch.get_num_threads()} thread, shared ("
              f"{platform.processor() or platform.machine()})", last={name: records[-1] for name, records in curves.items()})
(out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
PY
