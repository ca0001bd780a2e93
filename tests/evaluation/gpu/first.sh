#!/usr/bin/env bash
# First steps on a GPU host without a package registry, from the root of a copied checkout, within 9 minutes.
#
#   OUT=/some/folder WHEELS=folder/of/wheels tests/evaluation/gpu/first.sh [STEP…]
#
# Steps: correct, speed, large, tune; all but `large` where none is named. WHEELS (optional) holds what that host's Python
# lacks beside torch and transformers: pydantic, pydantic_core, annotated-types, typing-inspection, platformdirs, filelock,
# hypothesis, sortedcontainers, gguf; for `tune` also optuna, alembic, Mako, SQLAlchemy, colorlog. Reports and logs end in OUT.
# Exit code 1: correctness was not shown to the end.
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
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$out/site" "$WHEELS"/*.whl || exit
    export PYTHONPATH=$PYTHONPATH:$out/site
fi
step() { echo "== ${SECONDS} s: $*"; }

step "imports and the GPUs"
python3 -c 'import torch, pipetune; print(pipetune.Plan, torch.version.cuda, torch.cuda.device_count(), "GPUs")' || exit
nvidia-smi --query-gpu=clocks.sm,power.draw,memory.used --format=csv -l 5 >"$out/smi.csv" & smi=$! # keeps the driver loaded
trap 'kill $smi 2>/dev/null' EXIT

failed=()
# Kernels, streams and transport; memory; the output of split models over staging and NCCL. None of it is timed: side by side.
correct() {
    step "correct"
    local logs=() pids=() one
    mkdir -p "$out/work"
    begin() { # log, arguments of pytest
        timeout 260 python3 -m pytest -q -m gpu -p no:cacheprovider -o addopts= -o filterwarnings= --durations=20 \
            --basetemp "$out/work/$1" "${@:2}" >"$out/$1.log" 2>&1 &
        pids+=($!) logs+=("$1")
    }
    begin runtime tests/bench
    for one in memory equality-staged-fp32 equality-nccl-fp32 equality-staged-bf16 equality-nccl-bf16; do
        begin "$one" tests/evaluation/gpu -k "$one"
    done
    for one in "${!pids[@]}"; do
        wait "${pids[one]}" || failed+=("${logs[one]}")
        step "${logs[one]}: $(tail -1 "$out/${logs[one]}.log")"
    done
    find "$out/work" \( -name 'equality-*.json' -o -name memory.json \) -exec cp {} "$out" \;
}
sections() { # folder, seconds, sections
    local only=() one
    for one in "${@:3}"; do only+=(--only "$one"); done
    timeout $(($2 + 10)) python3 -m tests.evaluation.gpu "${only[@]}" -o "$out/$1" --max-minutes "$(($2 / 60)).$(($2 % 60 * 10 / 60))"
}
speed() { step "speed" && sections speed 140 machine timing decode-small; }
large() { step "speed of the 7B shape" && sections large 145 machine decode-large; }
tune() {
    step "a search"
    python3 -c 'import sys, pathlib, tests.evaluation.gpu.models as m; m.save_config(pathlib.Path(sys.argv[1]), m.SMALL)' "$out/model"
    timeout 130 python3 -m pipetune tune --model "$out/model" --load-format dummy --dtype bfloat16 --devices cuda:0 \
        --num-prompts 16 --input-len 64 --output-len 32 --n-trials 4 --timeout 25s --finalists 1 --finalist-rounds 1 \
        --max-finalist-rounds 1 --baseline-batch-sizes 16 --no-progress -o "$out/tune" 2>&1 | tee "$out/tune.log" | tail -40
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=(tune)
}
[ $# -gt 0 ] || set -- correct speed tune
for name in "$@"; do "$name"; done

step "done: $out${failed[*]:+; not shown to be right: ${failed[*]}}"
[ ${#failed[@]} -eq 0 ]
