#!/usr/bin/env bash
# First steps on a GPU host without a package registry, from the root of a copied checkout, within 8 minutes.
#
#   OUT=/some/folder WHEELS=folder/of/wheels tests/evaluation/gpu/first.sh
#
# WHEELS (optional) holds what that host's Python lacks beside torch and transformers: pydantic, pydantic_core,
# annotated-types, typing-inspection, platformdirs, filelock, hypothesis, sortedcontainers; for `tune` also optuna, alembic,
# Mako, SQLAlchemy, colorlog. Reports and logs end in OUT. Exit code 1: correctness was not shown to the end.
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

failed=()
# What proves correctness must end, and end well.
correct() { # log, seconds, arguments of pytest
    local log=$1 seconds=$2
    shift 2
    timeout "$seconds" python3 -m pytest -q -m gpu -p no:cacheprovider -o addopts= -o filterwarnings= "$@" 2>&1 |
        tee "$out/$log.log" | tail -15
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$log")
}

step "kernels, streams and transport on one GPU"
correct runtime 75 tests/bench/runtime

step "memory, and the output of split models over staging and NCCL"
correct correct 190 tests/evaluation/gpu -k "memory or fp32" --basetemp "$out/correct"

step "speed"
timeout 120 python3 -m tests.evaluation.gpu --only machine --only decode-small -o "$out/gpu" --max-minutes 1.9

step "a search"
python3 -c 'import sys, pathlib, tests.evaluation.gpu.models as m; m.save_config(pathlib.Path(sys.argv[1]), m.SMALL)' "$out/model"
timeout 70 python3 -m pipetune tune --model "$out/model" --load-format dummy --dtype bfloat16 --devices cuda:0 \
    --num-prompts 16 --input-len 64 --output-len 32 --n-trials 4 --timeout 25s --finalists 1 --finalist-rounds 1 \
    --max-finalist-rounds 1 --baseline-batch-sizes 16 --no-progress -o "$out/tune" 2>&1 | tee "$out/tune.log" | tail -20
[ "${PIPESTATUS[0]}" -eq 0 ] || failed+=(tune)

step "done: $out${failed[*]:+; not shown to be right: ${failed[*]}}"
[ ${#failed[@]} -eq 0 ]
