#!/usr/bin/env bash
# From a model directory and three adapters to finished rollouts: examples/02_convert_and_rollout.sh [MODEL_DIR]
# Needs an environment with the package and its dev extra (`make install`, then activate it).
# TASKS, SHARING and BACKEND change the defaults; BACKEND=eager needs no C++ compiler.
set -euo pipefail
cd "$(dirname "$0")/.."

work=.demo
model=${1:-$work/model}
world=examples/fact_world
adapters=plan=$world/adapters/plan,action=$world/adapters/action,reflect=$world/adapters/reflect
backend=${BACKEND:-compiled}
mkdir -p "$work"

if [ ! -d "$model" ]; then
    python -c 'import pathlib, sys; from lragent_cli.demo_model import write_model; write_model(pathlib.Path(sys.argv[1]))' "$model"
fi

# Shows the cache streams and refusals before anything is compiled.
lragent inspect "$model" --adapters "$adapters" --memory 1GiB

if [ ! -d "$work/example.lragent" ]; then
    layouts=auto
    if [ "$backend" = eager ]; then layouts=none; fi
    lragent convert "$model" --adapters "$adapters" -o "$work/example.lragent" --layouts "$layouts"
fi

python -m examples.fact_world.world --split test --n "${TASKS:-4}" --out "$work/example-tasks.jsonl"

# After Ctrl-C, call it again: --resume skips the tasks that already have a result. It refuses results of another run.
lragent rollout "$work/example.lragent" --workflow "$world/workflow.py:workflow" \
    --tasks "$work/example-tasks.jsonl" --out "$work/example-results.jsonl" --resume \
    --sharing "${SHARING:-auto}" --concurrency 4 --kv-memory 1GiB --backend "$backend"

head -c 400 "$work/example-results.jsonl"
echo

# Without evidence, auto shares nothing. This measures what sharing would change for these adapters, and keeps it.
lragent verify "$work/example.lragent" --trajectories "$work/example-results.jsonl" --html "$work/example-drift.html"
