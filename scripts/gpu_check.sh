#!/usr/bin/env bash
# What only a GPU can prove, in stages of less than nine minutes that go on where they stopped:
#     bash scripts/gpu_check.sh STAGE OUT [EARLIER] [--dry]
# STAGE    numerics (every kernel against its reference), attention, decode, moe, fused, lightning (each family timed
#          against its peers), or all
# OUT      where results go: numerics.jsonl, FAMILY.jsonl, result.json, roofline.png
# EARLIER  a folder with what an earlier run left in its OUT: its rows are not measured again
# --dry    tiny rows on the CPU, to try this script; nothing is measured
# It needs python3 with jax, numpy, jaxtyping, matplotlib and pytest. Without jax-triton our Triton kernels decline,
# without torch or tokamax these peers are left out, each with its line. Wheels of them may lie in .whl/: they are
# installed beside, without an index (for triton 3.6: pip download --no-deps -d .whl jax-triton==0.3.1). PYTHON chooses
# another python.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

FAMILIES="attention decode moe fused lightning"
AGAIN=75 # experiments.kernels.sweep.AGAIN: a kernel broke the process; the next one leaves it out

words=() dry=""
for word in "$@"; do
    if [ "$word" = --dry ]; then dry=1; else words+=("$word"); fi
done
stage="${words[0]:-}" out="${words[1]:-}" earlier="${words[2]:-}"
case " numerics $FAMILIES all " in *" $stage "*) ;; *) stage="" ;; esac
if [ -z "$stage" ] || [ -z "$out" ] || [ ${#words[@]} -gt 3 ]; then
    sed -n '3,5p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi

PYTHON="${PYTHON:-$(if [ -x .venv/bin/python ]; then echo .venv/bin/python; else echo python3; fi)}"
seconds="${GPU_CHECK_SECONDS:-500}"
margin=45 # for what was begun within the budget
export PYTHONUNBUFFERED=1
if [ -n "$dry" ]; then # with more threads than cores: the interpreter's kernels wait in them for one another
    export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=8" margin=600
fi
mkdir -p "$out"
if [ -n "$earlier" ]; then cp -n "$earlier"/*.jsonl "$out"/ 2>/dev/null || true; fi
if compgen -G ".whl/*.whl" >/dev/null; then
    site="$(mktemp -d)"
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl &&
        export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

numerics() { # budget
    # The tests' own conftest wants the whole package's dependencies: only the kernels' one is read.
    MOEJAX_GPU_CHECK="$out/numerics.jsonl" MOEJAX_GPU_SECONDS="$1" MOEJAX_GPU_DRY="$dry" \
        timeout -k 10 $(($1 + margin)) "$PYTHON" -m pytest -m gpu -W default -p no:cacheprovider \
        --confcutdir=tests/pallas_kernels --tb=short tests/pallas_kernels/test_on_gpu.py
    local code=$?
    if [ $code = 5 ]; then return 0; fi # no test was chosen
    return $code
}

bench() { # family budget
    timeout -k 10 $(($2 + margin)) "$PYTHON" -m experiments.bench_kernels --family "$1" --budget "$2" --out "$out" \
        ${dry:+--smoke}
}

run_stage() { # stage budget; another process goes on where a kernel broke one
    local code end=$((SECONDS + $2)) left=$2
    echo "== $1"
    while true; do
        if [ "$1" = numerics ]; then numerics $left; else bench "$1" $left; fi
        code=$?
        left=$((end - SECONDS))
        if [ $code != $AGAIN ] || [ $left -le 0 ]; then return $code; fi
    done
}

stages=("$stage")
if [ "$stage" = all ]; then read -ra stages <<<"numerics $FAMILIES"; fi
worst=0
for i in "${!stages[@]}"; do
    left=$((seconds - SECONDS))
    run_stage "${stages[$i]}" $((left > 0 ? left / (${#stages[@]} - i) : 0))
    code=$?
    if [ $code != 0 ]; then echo "== ${stages[$i]} ended with code $code"; worst=$code; fi
done
exit $worst
