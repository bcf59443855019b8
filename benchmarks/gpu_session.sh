#!/usr/bin/env bash
# What kdscale claims for a GPU, checked on one, in order of cost: the kernels against fp64, their benchmark with its targets (met or
# missed), attention within documents and compiled layers beside a dense mask, TRL's GKDTrainer beside our losses, then SmolLM2-135M pruned to half and
# distilled on 50M tokens (tokens/s and MFU are in its log and report).
#
#   bash benchmarks/gpu_session.sh TEACHER TEXT [OUT]
#
# TEACHER: a folder (kdscale get-teacher smollm2-135m-instruct FOLDER); TEXT: .jsonl or .jsonl.gz with a "text" a line; OUT: a folder for
# everything written (default runs/gpu-session). A part that fails is named at the end; the others run all the same. Peers take
# part where they are installed: pip install -e '.[bench]' trl. TOKENS=1M makes the last part short.
set -uo pipefail
cd "$(dirname "$0")/.."
teacher=${1:?the teacher\'s folder} text=${2:?text to distil on} out=${3:-runs/gpu-session}
export PYTHONPATH=.:kernels:launch${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
failed=()

part() { # NAME COMMAND...: its output on the screen and in OUT/NAME.log
  local name=$1
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.log" || failed+=("$name")
}

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  part tests python -m pytest -m gpu -q -p no:cacheprovider
  part kernels python benchmarks/kernels/run.py --device cuda --out "$out/kernels"
  part attention python benchmarks/distill/packed_attention.py --device cuda --dtype bfloat16 --seq-len 4096 --rows 4 \
    --kinds "dense mask" "within documents" compiled
else
  echo "== no GPU: tests, kernels and attention are left out" && failed+=(tests kernels attention)
fi
if python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("trl") is None)'; then
  part trl python benchmarks/distill/trl_gkd.py --teacher "$teacher" --text "$text" --batch "${BATCH:-8}" --length "${LENGTH:-1024}"
else
  echo "== trl is not installed: left out"
fi
settings=()
for setting in "teacher.path=$teacher" "run_dir=$out/run" "data.sources=[{path: $text}]" "distill.tokens=${TOKENS:-50M}" \
  "distill.seq_len=${LENGTH:-1024}" distill.global_batch=64 distill.micro_batch=16 distill.validate_every=100 \
  distill.checkpoint_every=200; do
  settings+=(--set "$setting")
done
part distil python -m kdscale.cli.main run demo "${settings[@]}"

if ((${#failed[@]})); then
  echo "failed: ${failed[*]} (logs in $out)"
  exit 1
fi
echo "all parts ran; logs and results in $out"
