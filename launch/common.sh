#!/usr/bin/env bash
# Sourced by the launchers tpu_vm.sh, queued.sh, gke.sh, slurm.sbatch and preflight.sh, and by worker.sh. Flags are written --name=value, what
# stands behind -- are the flags of the training command, --dry_run prints each command instead of running it.
# Exit status: 2 for a wrong command line, 1 for what these scripts refuse or give up, else that of the tool that failed.

# shellcheck disable=SC2034 # ROOT, NOT_FINISHED and stopped are for whoever sources this

unset CDPATH
shopt -u patsub_replacement 2>/dev/null || true # & in a replacement is a letter like others, as before bash 5.2
ROOT=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
PROGRAM=launch/${0##*/}
TRAINING=() # what stands behind --
TRIES=4         # of a command that may be repeated
NOT_FINISHED=75 # the status of a training that saved and stopped before its last step, for a signal or a notice: the same command goes on
dry_run="" yes="" stopped=""

fail() { # STATUS MESSAGE…
  echo "error: ${*:2}" >&2
  exit "$1"
}

usage() { fail 2 "$@"; }

note() { echo "$PROGRAM: $*" >&2; }

# One line that a shell reads as exactly these arguments.
quoted() {
  local word line="" quote="'" escaped="'\\''"
  for word; do
    case $word in
      *$'\n'*) printf -v word %q "$word" ;;
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word=$quote${word//$quote/$escaped}$quote ;;
    esac
    line+=" $word"
  done
  echo "${line:1}"
}

# parse "NAME…" "SWITCH…" ARGUMENT… sets the variable NAME for --NAME=value and the variable SWITCH to 1 for --SWITCH.
parse() {
  local names=" $1 " switches=" $2 dry_run " argument key # none of these is a flag's name
  shift 2
  while [ $# -gt 0 ]; do
    argument=$1
    shift
    key=${argument%%=*}
    key=${key#--}
    case $argument in
      --) TRAINING=("$@") && return ;;
      --*=*) [[ $names == *" $key "* ]] && printf -v "$key" %s "${argument#*=}" && continue ;;
      --*) [[ $switches == *" $key "* ]] && printf -v "$key" 1 && continue ;;
    esac
    [[ $names != *" $key "* ]] || usage "--$key needs a value: --$key=…"
    [[ $switches != *" $key "* ]] || usage "--$key takes no value"
    # shellcheck disable=SC2086 # the names are words
    usage "$argument is not known; known are$(printf ' --%s=…' $names)$(printf ' --%s' $switches); flags of the training stand behind --"
  done
}

# need NAME EXAMPLE…: each NAME must have been given; nothing is guessed.
need() {
  while [ $# -gt 0 ]; do
    [ -n "${!1}" ] || usage "--$1 is missing and has no default; for example --$1=$2"
    shift 2
  done
}

is_number() { [[ $1 =~ ^[0-9]{1,9}$ ]]; }

# need_number NAME LEAST: NAME must hold a number, which then has no leading zeros, as arithmetic would read those as octal.
need_number() {
  is_number "${!1}" && [ "${!1}" -ge "$2" ] || usage "--$1=${!1} is not a whole number of at least $2"
  printf -v "$1" %d "$((10#${!1}))"
}

# Prints the last value of the training's flag --NAME=value or --NAME value.
training_flag() {
  local argument value="" next=""
  for argument in ${TRAINING[@]+"${TRAINING[@]}"}; do
    [ -z "$next" ] || value=$argument
    next=""
    case $argument in
      "--$1="* | "-$1="*) value=${argument#*=} ;;
      "--$1" | "-$1") next=1 ;;
    esac
  done
  printf %s "$value"
}

need_training() {
  [ -n "$(training_flag config)" ] && [ -n "$(training_flag workdir)" ] ||
    usage "name config and workdir behind --; for example: … -- --config=configs/llada_moe.py:variant=7b_a1b --workdir=gs://BUCKET/RUN"
}

run() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

# Runs a command that may be repeated, up to TRIES times with growing pauses. Ends with its status.
retry() {
  local try status pause=5
  for ((try = 1; ; try++)); do
    status=0
    "$@" </dev/null || status=$?
    [ "$status" -ne 0 ] && [ "$try" -lt "$TRIES" ] || return "$status"
    note "try $try of $TRIES ended with status $status, the next one in $pause s: $(quoted "$@")"
    sleep "$pause"
    pause=$((3 * pause))
  done
}

run_retrying() {
  if [ -n "$dry_run" ]; then quoted "$@"; else retry "$@"; fi
}

# ask VARIABLE ASSUMED COMMAND… puts what the command prints into VARIABLE; --dry_run assumes ASSUMED.
ask() {
  local answer
  if [ -n "$dry_run" ]; then
    quoted "${@:3}"
    answer=$2
  else
    answer=$(retry "${@:3}")
  fi
  printf -v "$1" %s "$answer"
}

pass_on() { kill -TERM "$1" 2>/dev/null || true; } # PROCESS

# Runs a command as a child and passes SIGTERM on to it by pass_on. Sets stopped when a signal came; ends with the command's status.
pass_signals() {
  local child="" interrupted code status=0
  trap 'stopped=1 interrupted=1; [ -z "$child" ] || pass_on "$child"' TERM
  "$@" &
  child=$!
  [ -z "$stopped" ] || pass_on "$child"
  while # a signal ends wait early, and then it has to be called again; 127: the child was waited for already
    interrupted="" code=0
    wait "$child" || code=$?
    [ "$code" -eq 127 ] || status=$code
    [ -n "$interrupted" ]
  do :; done
  trap '' TERM # whoever called has yet to write the status down
  return "$status"
}

# confirm WHAT NAME: the name must be typed, unless --yes was given.
confirm() {
  local typed=""
  [ -z "$yes$dry_run" ] || return 0
  printf 'This deletes %s. Type its name, %s, to go on: ' "$1" "$2" >&2
  read -r typed || true
  [ "$typed" = "$2" ] || fail 1 "not confirmed, nothing was deleted; type $2 when asked, or give --yes"
}

need_tools() {
  local tool
  [ -z "$dry_run" ] || return 0
  for tool; do
    command -v "$tool" >/dev/null || fail 1 "$tool is not installed, or not on PATH"
  done
}

# The cloud's names of TPUs are not always those that everyone uses.
check_type() {
  case $1 in
    v5e-*) usage "--type=$1: the cloud's name of it is v5litepod-${1#v5e-}" ;;
  esac
  [[ $1 =~ ^v[0-9]+[a-z]*-[1-9][0-9]*$ ]] || usage "--type=$1 is no accelerator type; for example v5p-128, v5litepod-256, v6e-256"
}
