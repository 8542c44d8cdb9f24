#!/usr/bin/env bash
# Everything that must hold before a commit: lint, format, types, tests. With arguments: pytest alone, with them.
#     bash scripts/test.sh                    bash scripts/test.sh tests/ops -x                    bash scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ROOT"
make_venv dev aot || {
    echo "warning: no wheels to compile for GPUs with: what is compiled ahead of time is skipped" >&2
    make_venv dev
}
SECONDS=0
trap 'echo "$([ $? = 0 ] && echo passed || echo FAILED) after $((SECONDS / 60)) min $((SECONDS % 60)) s"' EXIT

python() { "$VENV/bin/python" -m "$@"; }

if [ $# = 0 ]; then
    echo "== ruff"
    python ruff check --quiet .
    python ruff format --check .
    echo "== pyright"
    python pyright --pythonpath "$VENV/bin/python"
    echo "== pytest"
    set -- -n 2 --dist loadgroup # a file's tests stay together: see tests/conftest.py
fi
python pytest "$@"
