#!/usr/bin/env bash
# Train a small mixture of experts on this machine, whatever it is, and let it write. Arguments go to the training:
#     bash scripts/demo.sh                    bash scripts/demo.sh --train.steps 1000 --out runs/longer
# Run it again and it goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ROOT"
make_venv

out=runs/demo previous=""
for word in "$@"; do
    case "$word" in --out=*) out="${word#--out=}" ;; esac
    if [ "$previous" = --out ]; then out="$word"; fi
    previous="$word"
done

if [ -f "$out/config.toml" ]; then
    echo "going on with the run in $out (remove it to start afresh)"
    "$VENV/bin/python" -m experiments.train --out "$out" --resume "$@"
else
    "$VENV/bin/python" -m experiments.train --model demo --mesh auto --out "$out" "$@"
fi
if [ -f "$out/config.toml" ]; then "$VENV/bin/python" -m experiments.generate --run "$out"; fi # --help made no run
