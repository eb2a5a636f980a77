#!/usr/bin/env bash
# What the launchers run on each worker, in its own copy of the repository: bash launch/worker.sh COMMAND
#   setup                      make .venv with the extras tpu and gcs; finds a Python, or brings one by uv
#   start -- TRAINING FLAGS    train in a session of its own, which outlives the connection that started it
#   train -- TRAINING FLAGS    train in the foreground; the status is that of the training: 75 when it saved and stopped before its
#                              last step, as a notice of the cloud asked, and 143 when this script got SIGTERM before
#   status                     one line: worker HOST: running PID | ended STATUS | no run
#   logs [LINES]               the last lines and all that follow, until the training ends
#   stop [SECONDS]             SIGTERM, so that the training saves, and wait for its end (default: 120 s)
# Log, process id and status of the last run are in ~/llada_jax_run.
set -euo pipefail
HERE=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source=/dev/null
source "$HERE/setup.sh"
# shellcheck source=/dev/null
source "$HERE/common.sh"
RUN=${HOME:-/tmp}/llada_jax_run

# Sets PYTHON_BIN, and shows jax the libtpu that set_up keeps off Python's path.
find_environment() {
  PYTHON_BIN=${LLADA_PYTHON:-$VENV/bin/python}
  [ -x "$PYTHON_BIN" ] || die "$PYTHON_BIN is not there; run: bash '$ROOT/launch/worker.sh' setup"
  if [ -e "$VENV/libtpu/libtpu/libtpu.so" ]; then
    export TPU_LIBRARY_PATH=$VENV/libtpu/libtpu/libtpu.so
  fi
  export PYTHONUNBUFFERED=1
}

# The images of TPU VMs may hold an older Python alone.
bring_python() {
  local python
  for python in "$VENV/bin/python" ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3 python; do
    if is_suitable "$python" && "$python" -c 'import venv, ensurepip' 2>/dev/null; then return; fi
  done
  python3 -m pip install --quiet --user uv
  python3 -m uv python install 3.12
  PYTHON=$(python3 -m uv python find 3.12)
  export PYTHON
}

# What watches must know who stopped the training: somebody by SIGTERM (tpu_vm.sh stop), or a notice.
train() {
  local status=0
  cd -- "$ROOT"
  pass_signals "$PYTHON_BIN" -m llada_jax.train "$@" || status=$?
  if [ -n "$stopped" ] && [ "$status" -eq "$NOT_FINISHED" ]; then status=143; fi
  return "$status"
}

# Sets PID to that of the run's process, or to nothing when it does not run.
find_run() {
  PID=$(cat "$RUN/pid" 2>/dev/null || true)
  if [ -n "$PID" ] && ! ps -o args= -p "$PID" 2>/dev/null | grep -q worker.sh; then PID=""; fi
}

command=${1:-}
shift || true
[ "${1:-}" != -- ] || shift
case $command in
  setup)
    bring_python
    set_up tpu gcs
    ;;
  train)
    find_environment
    train "$@"
    ;;
  start)
    find_environment
    find_run
    [ -z "$PID" ] || die "process $PID trains here already; see launch/tpu_vm.sh logs, or stop it first"
    mkdir -p "$RUN"
    rm -f "$RUN/status"
    setsid nohup bash "$ROOT/launch/worker.sh" attend "$@" </dev/null >>"$RUN/log" 2>&1 &
    echo $! >"$RUN/pid"
    echo "worker $HOSTNAME: started, process $!"
    ;;
  attend) # start's other half
    echo "--- $(date -u +%Y-%m-%dT%H:%M:%SZ) python -m llada_jax.train $*"
    find_environment
    status=0
    train "$@" || status=$?
    echo "$status" >"$RUN/status"
    ;;
  status)
    find_run
    if [ -n "$PID" ]; then
      echo "worker $HOSTNAME: running $PID"
    elif [ -e "$RUN/pid" ]; then
      echo "worker $HOSTNAME: ended $(cat "$RUN/status" 2>/dev/null || echo without a status)"
    else
      echo "worker $HOSTNAME: no run"
    fi
    ;;
  logs)
    find_run
    [ -e "$RUN/log" ] || die "no run was started here"
    if [ -n "$PID" ]; then exec tail -n "${1:-50}" --pid="$PID" -F "$RUN/log"; else exec tail -n "${1:-50}" "$RUN/log"; fi
    ;;
  stop)
    find_run
    if [ -n "$PID" ]; then
      kill -TERM "$PID"
      for ((left = ${1:-120}; left > 0; left--)); do
        sleep 1
        find_run
        [ -n "$PID" ] || break
      done
      [ -z "$PID" ] || die "process $PID still runs ${1:-120} s after SIGTERM"
    fi
    echo "worker $HOSTNAME: stopped"
    ;;
  *) die "name a command: bash launch/worker.sh {setup,start,train,status,logs,stop}" ;;
esac
