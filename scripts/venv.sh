#!/usr/bin/env bash
# Make .venv in the repository's root, or reuse it: `source scripts/venv.sh; make_venv [extra...]`, or run it as a script.
# MOEJAX_PYTHON=/path/to/python chooses the interpreter.

ROOT="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
VERSIONS="3.12 3.13 3.11" # the first that really starts is taken

# A name on PATH may be a shim that leads nowhere, and a python may lack venv: only running it tells.
starts() { # python version
    "$1" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" >/dev/null 2>&1
}

candidates() { # version; one path or name a line
    printf '%s\n' "python$1" python3
    ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python 2>/dev/null | sort -rV || true
}

find_python() { # prints the path of the interpreter to use
    local version python
    for version in $VERSIONS; do
        if [ -n "${MOEJAX_PYTHON:-}" ]; then
            if starts "$MOEJAX_PYTHON" "$version"; then echo "$MOEJAX_PYTHON"; return; fi
            continue
        fi
        while IFS= read -r python; do
            if starts "$python" "$version"; then echo "$python"; return; fi
        done < <(candidates "$version")
    done
    if [ -n "${MOEJAX_PYTHON:-}" ]; then
        echo "error: MOEJAX_PYTHON ($MOEJAX_PYTHON) does not start as one of python $VERSIONS with venv and pip" >&2
    else
        echo "error: found no python that starts among $VERSIONS (by name, as python3, in pyenv); install one" >&2
    fi
    return 1
}

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q GPU; }

# What the environment was made from: where it lies, which files decided, which extras are in it.
fingerprint() {
    "$VENV/bin/python" - "$ROOT" "$ROOT/pyproject.toml" "$ROOT/constraints.txt" <<'PYTHON'
import hashlib, pathlib, sys
root, *files = sys.argv[1:]
print(hashlib.sha256(b"\0".join([root.encode(), *(pathlib.Path(f).read_bytes() for f in files)])).hexdigest())
PYTHON
}

usable() { # .venv starts, has pip, and is of the version that MOEJAX_PYTHON asks for, if it asks
    "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.prefix == sys.base_prefix)' >/dev/null 2>&1 || return 1
    [ -z "${MOEJAX_PYTHON:-}" ] || [ "$("$VENV/bin/python" -V)" = "$("$MOEJAX_PYTHON" -V 2>&1)" ]
}

make_venv() { # extras wanted; what an earlier call installed stays
    local python stamp="$VENV/moejax-stamp" old="" extras="" wanted="$*" extra
    if has_gpu; then wanted="$wanted cuda"; fi
    if ! usable; then
        python="$(find_python)" || return 1
        echo "making .venv with $("$python" -V) ($python)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV"
    fi
    if [ -f "$stamp" ]; then read -r old extras <"$stamp" || true; fi
    if [ "$old" != "$(fingerprint)" ]; then old=""; fi
    for extra in $wanted; do
        case " $extras " in *" $extra "*) ;; *) extras="${extras:+$extras }$extra" old="" ;; esac
    done
    if [ -n "$old" ]; then
        echo "using .venv ($("$VENV/bin/python" -V))"
        return
    fi
    echo "installing moejax${extras:+ with $extras} into .venv (a minute or two) ..."
    rm -f "$stamp" # it returns when all is well
    (cd "$ROOT" && "$VENV/bin/python" -m pip install -qq --disable-pip-version-check \
        -c constraints.txt -e ".${extras:+[${extras// /,}]}") || return 1
    echo "$(fingerprint) $extras" >"$stamp"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    make_venv "$@"
fi
