#!/usr/bin/env bash
# Run an experiment as N processes on this machine's CPU, each with D devices, as a cluster would run it:
#     bash scripts/launch_local.sh N [--devices-per-process D] -- EXPERIMENT [ARGUMENT...]
#     bash scripts/launch_local.sh 2 --devices-per-process 4 -- train --smoke --mesh data8 --out runs/two
# Every line of output begins with its process's number. Ctrl-C and SIGTERM are passed on: training saves and ends; a
# second one ends it at once. When one process dies, the others are ended within GRACE (5) seconds, the script says who
# died and how to go on, and exits with that process's code. A process that is alive and silent for
# MOEJAX_HEARTBEAT_SECONDS (10 here, 60 elsewhere) counts as dead. PYTHON=/path/to/python chooses the interpreter.
set -uo pipefail

GRACE="${GRACE:-5}"
ROOT="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-$(if [ -x "$ROOT/.venv/bin/python" ]; then echo "$ROOT/.venv/bin/python"; else command -v python3; fi)}"

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }
fail() { echo "error: $* (see scripts/launch_local.sh --help)" >&2; exit 2; }
is_count() { case "$1" in '' | *[!0-9]* | 0*) return 1 ;; esac; }

num="" devices=1
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --) shift; break ;;
        --devices-per-process) devices="${2:-}"; shift $(($# > 1 ? 2 : 1)) ;;
        --devices-per-process=*) devices="${1#*=}"; shift ;;
        -*) fail "unknown option $1" ;;
        *) [ -z "$num" ] || fail "$1 stands before --: the experiment stands after it"; num="$1"; shift ;;
    esac
done
is_count "$num" || fail "N ($num) must be a number of processes, at least 1"
is_count "$devices" || fail "--devices-per-process ($devices) must be at least 1"
[ $# -gt 0 ] || fail "no experiment after --"
[ -f "$ROOT/experiments/$1.py" ] || fail "no experiment experiments/$1.py"

port="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')" || exit 2
export MOEJAX_COORDINATOR="127.0.0.1:$port" MOEJAX_NUM_PROCESSES="$num"
export MOEJAX_HEARTBEAT_SECONDS="${MOEJAX_HEARTBEAT_SECONDS:-10}"
export JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo PYTHONUNBUFFERED=1
# Of a flag that is there twice the last one counts. A busy machine is no reason to give up: heartbeats find the dead.
XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
export XLA_FLAGS="$XLA_FLAGS --xla_cpu_collective_call_terminate_timeout_seconds=600"
# Should this script be killed outright, the kernel tells its processes to save and end.
tied=""
if setpriv --pdeathsig TERM true 2>/dev/null; then tied="setpriv --pdeathsig TERM"; fi

alive() { kill -0 "$1" 2>/dev/null; }
tell() { for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done; }
any_alive() { for pid in "$@"; do if alive "$pid"; then return 0; fi; done; return 1; }
nap() { sleep "$1" & wait $!; } # a signal is heard at once
wait_for() { # seconds, pids...
    local until=$(($(date +%s) + $1)); shift
    while any_alive "$@" && [ "$(date +%s)" -lt "$until" ]; do nap 0.1; done
}

pids=() printers=() stopping=""
trap 'stopping=1; tell TERM' INT TERM HUP
trap 'tell KILL' EXIT
cd "$ROOT"
for ((i = 0; i < num; i++)); do
    exec 3> >(trap '' INT TERM HUP; exec sed -u "/^\[Gloo\]/d;s/^/[$i] /"); printers+=($!)
    exec 4> >(trap '' INT TERM HUP; exec sed -u "s/^/[$i] /" >&2); printers+=($!)
    MOEJAX_PROCESS_ID=$i $tied "$PYTHON" -m "experiments.$1" "${@:2}" >&3 2>&4 3>&- 4>&- &
    pids+=($!)
    exec 3>&- 4>&-
done

exec 5>&2 2>/dev/null # bash's own words about killed jobs are dropped
code=0 left=" ${!pids[*]} "
while [ "$left" != " " ] && [ $code = 0 ]; do
    for i in $left; do
        if alive "${pids[$i]}"; then continue; fi
        left="${left/ $i / }"
        wait "${pids[$i]}" || { code=$?; dead=$i; break; }
    done
    if [ $code = 0 ]; then nap 0.2; fi
done

if [ $code != 0 ]; then
    how="ended with exit code $code"
    if [ $code -gt 128 ]; then how="was killed by SIG$(kill -l $((code - 128)))"; fi
    echo "error: process $dead of $num $how; stopping the others within $GRACE seconds" >&5
    wait_for "$GRACE" "${pids[@]}"
    tell KILL
fi
wait_for 2 "${printers[@]}"
if [ $code != 0 ] && [ -z "$stopping" ]; then
    again="$(printf ' %q' "$@")"; case "$again " in *" --resume "*) ;; *) again="$again --resume" ;; esac
    echo "error: the run stopped; a training goes on from its last checkpoint, with any number of processes:" >&5
    echo "  bash scripts/launch_local.sh $num --devices-per-process $devices --$again" >&5
fi
exit $code
