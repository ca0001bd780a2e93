#!/usr/bin/env bash
# First steps on a GPU host without a package registry, from the root of a copied checkout, within 8 minutes.
#
#   OUT=/some/folder WHEELS=folder/of/wheels tests/evaluation/gpu/first.sh
#
# WHEELS (optional) holds what that host's Python lacks beside torch and transformers: pydantic, pydantic_core,
# annotated-types, typing-inspection, platformdirs, filelock; for `tune` also optuna, alembic, Mako, SQLAlchemy, colorlog.
# Reports and logs end in OUT.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
out=$(mkdir -p "${OUT:?a folder for reports and logs}" && cd "$OUT" && pwd) || exit
# A copy by other means than git may have lost the links, or carry copies in their place.
for name in bench tuner; do
    [ -L "pipetune/$name" ] || rm -rf "pipetune/${name:?}"
    ln -sfn "../$name" "pipetune/$name"
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ -n "${WHEELS:-}" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$out/site" "$WHEELS"/*.whl || exit
    export PYTHONPATH=$PYTHONPATH:$out/site
fi
step() { echo "== ${SECONDS} s: $*"; }

step "imports and the GPUs"
python3 -c 'import torch, pipetune; print(pipetune.Plan, torch.version.cuda, torch.cuda.device_count(), "GPUs")' || exit
nvidia-smi --query-gpu=clocks.sm,power.draw,memory.used --format=csv -l 5 >"$out/smi.csv" & smi=$! # keeps the driver loaded
trap 'kill $smi 2>/dev/null' EXIT

step "kernels, streams and transport on one GPU"
timeout 90 python3 -m pytest -q -m gpu -p no:cacheprovider tests/bench/runtime -o addopts= -o filterwarnings= 2>&1 |
    tee "$out/runtime.log" | tail -15

step "memory, and the output of split models"
timeout 200 python3 -m pytest -q -m gpu -p no:cacheprovider tests/evaluation/gpu -k "memory or staged" \
    -o addopts= -o filterwarnings= 2>&1 | tee "$out/correct.log" | tail -15

step "speed"
timeout 180 python3 -m tests.evaluation.gpu --only machine --only decode-small -o "$out/gpu" --max-minutes 2.8
step "done: $out"
