#!/usr/bin/env bash
# Sourced by demo.sh, test.sh and .ci/run. Sets ROOT (the repository) and, by `set_up [extra…]`, PYTHON_BIN: an environment that
# holds requirements.txt and the named extras of pyproject.toml. By default that is ROOT/.venv, made and filled here. TESTS are
# the extras of the tests.
#   PYTHON=python3.12               the interpreter that makes .venv (default: the first of python3.12, python3.11, python3, python that fits)
#   LLADA_PYTHON=/env/bin/python    use this environment instead; nothing is installed into it

unset CDPATH
ROOT=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
VENV=$ROOT/.venv
LOCK=$ROOT/.venv.lock # empty, or one line from the start of an installation to its good end
LOG=$VENV/install.log
NEEDED_MB=4000
AGAIN="bash '$0'"
TESTS=(dev notebooks)
case $OSTYPE-$HOSTTYPE in linux*-x86_64) TESTS+=(tpu) ;; esac # libtpu exists for no other machine

die() {
  echo "error: $*" >&2
  exit 1
}

version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

is_suitable() {
  case "$(version_of "$1")" in 3.11 | 3.12) ;; *) return 1 ;; esac
}

# Prints the exact requirements, one a line: the closure of requirements.txt, then the direct pins of the extras.
pins() {
  "$BASE" -c '
import sys, tomllib
root, *extras = sys.argv[1:]
with open(f"{root}/requirements.txt") as file:
    print(*(line.strip() for line in file if line.strip() and not line.startswith("#")), sep="\n")
with open(f"{root}/pyproject.toml", "rb") as file:
    optional = tomllib.load(file)["project"]["optional-dependencies"]
for extra in extras:
    print(*optional[extra], sep="\n")
' "$ROOT" "$@"
}

# Prints the direct requirements that PYTHON_BIN lacks, quoted for a shell.
missing() {
  "$PYTHON_BIN" -c '
import re, shlex, sys, tomllib
from importlib import metadata
root, *extras = sys.argv[1:]
with open(f"{root}/pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
lacking = []
for pin in project["dependencies"] + [pin for extra in extras for pin in project["optional-dependencies"][extra]]:
    try:
        metadata.version(re.match(r"[\w.-]+", pin)[0])
    except metadata.PackageNotFoundError:
        lacking.append(shlex.quote(pin))
print(*lacking)
' "$ROOT" "$@"
}

how_to_get_python() {
  local version
  for version in 3.12 3.11; do
    if command -v apt-cache >/dev/null && apt-cache show "python$version" >/dev/null 2>&1; then
      echo "apt-get install python$version python$version-venv"
      return
    fi
  done
  if command -v brew >/dev/null; then
    echo "brew install python@3.12"
  else
    echo "curl -LsSf https://astral.sh/uv/install.sh | sh && uv python install 3.12 && PYTHON=\"\$(uv python find 3.12)\" $AGAIN"
  fi
}

# Sets BASE to the first interpreter that fits and can make environments.
find_python() {
  local without_venv=""
  if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3.12 python3.11 python3 python; fi
  for BASE; do
    is_suitable "$BASE" || continue
    if "$BASE" -c 'import venv, ensurepip' 2>/dev/null; then return; fi
    without_venv=${without_venv:-$(version_of "$BASE")}
  done
  if [ -n "$without_venv" ]; then
    die "Python $without_venv has no venv module; run: apt-get install python$without_venv-venv"
  elif [ -n "${PYTHON:-}" ]; then
    die "PYTHON=$PYTHON is $(found "$PYTHON"), but Python 3.11 or 3.12 is needed; name another one, or run: env -u PYTHON $AGAIN"
  fi
  die "Python 3.11 or 3.12 is needed, but python3 is $(found python3); run: $(how_to_get_python)"
}

found() {
  local version
  version=$(version_of "$1")
  echo "${version:-not found}"
}

install() {
  local wanted=$1 start=$SECONDS free torch tpu
  if [ -s "$LOCK" ]; then
    echo "an earlier installation did not end: making .venv anew" >&2
    rm -rf -- "$VENV"
  fi
  if [ ! -d "$VENV" ]; then
    find_python
  elif is_suitable "$VENV/bin/python"; then
    BASE=$VENV/bin/python
  else
    die "$VENV holds no Python 3.11 or 3.12; run: rm -rf '$VENV' && $AGAIN"
  fi
  free=$("$BASE" -c 'import shutil, sys; print(shutil.disk_usage(sys.argv[1]).free >> 20)' "$ROOT")
  [ "$free" -ge "$NEEDED_MB" ] ||
    die "$free MB are free in $ROOT, but .venv takes up to $NEEDED_MB MB; make room, for example: $BASE -m pip cache purge"

  echo "installing $(grep -c . <<<"$wanted") packages for Python $(version_of "$BASE") into $VENV; this takes about a minute" >&2
  echo installing >&9
  mkdir -p "$VENV"
  rm -f "$VENV/installed"
  if [ "$BASE" != "$VENV/bin/python" ]; then
    "$BASE" -m venv "$VENV" >"$LOG" 2>&1 || die "$BASE -m venv failed: $(tail -n 1 "$LOG"); put it right and run again: $AGAIN"
  fi
  printf '%s\n' "$wanted" >"$VENV/wanted"
  torch=$(grep '^torch==' "$VENV/wanted" || true)
  [ -z "$torch" ] || pip_install "$torch" # alone and first, so that no other requirement chooses its build: some take gigabytes
  tpu=$(grep -F 'jax[tpu]==' "$VENV/wanted" || true)
  grep -vF 'jax[tpu]==' "$VENV/wanted" >"$VENV/direct"
  pip_install -r "$VENV/direct"
  [ -z "$tpu" ] || [ -e "$VENV/libtpu/$tpu" ] || install_libtpu "$tpu"
  mv "$VENV/wanted" "$VENV/installed"
  : >"$LOCK"
  echo "installed in $((SECONDS - start)) s (log: $LOG)" >&2
}

# The libtpu that fits jax, into a folder where only tests/conftest.py looks: on Python's path it would make every start of jax
# on a machine without TPUs search for them and print errors.
install_libtpu() {
  local pin
  pin=$("$VENV/bin/python" -c '
from importlib import metadata
print(*(line.split(";")[0] for line in metadata.requires("jax") if line.startswith("libtpu")))')
  rm -rf -- "$VENV/libtpu"
  mkdir "$VENV/libtpu"
  pip_install --no-deps --target "$VENV/libtpu" "$pin"
  : >"$VENV/libtpu/$1"
}

pip_install() {
  PIP_USER=0 "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >>"$LOG" 2>&1 || pip_failed
}

pip_failed() {
  if grep -q "No space left on device" "$LOG"; then
    die "the disk filled up during the installation; make room, also in ${TMPDIR:-/tmp}, and run again: $AGAIN"
  elif grep -Eq "ConnectionError|Connection refused|ConnectTimeout|name resolution|Name or service not known|unreachable|ProxyError|from versions: none" "$LOG"; then
    die "no connection to the package index (log: $LOG); with a network, run again: $AGAIN"
  fi
  die "pip failed: $(grep -m 1 "^ERROR" "$LOG" || tail -n 1 "$LOG") (log: $LOG); run again: $AGAIN"
}

set_up() {
  local wanted lacking
  if [ -n "${LLADA_PYTHON:-}" ]; then
    case "$LLADA_PYTHON" in
      /*) PYTHON_BIN=$LLADA_PYTHON ;;
      */*) PYTHON_BIN=$PWD/$LLADA_PYTHON ;;
      *) PYTHON_BIN=$(command -v -- "$LLADA_PYTHON" || echo "$LLADA_PYTHON") ;;
    esac
    is_suitable "$PYTHON_BIN" ||
      die "LLADA_PYTHON=$LLADA_PYTHON is $(found "$PYTHON_BIN"), but Python 3.11 or 3.12 is needed; run without it: env -u LLADA_PYTHON $AGAIN"
    lacking=$(missing "$@")
    [ -z "$lacking" ] || die "LLADA_PYTHON lacks packages; run: '$PYTHON_BIN' -m pip install -c '$ROOT/requirements.txt' $lacking"
    return
  fi
  [ -w "$ROOT" ] || die "$ROOT cannot be written; copy it, or use an environment that is there: LLADA_PYTHON=/path/to/python $AGAIN"
  BASE=$VENV/bin/python
  is_suitable "$BASE" || find_python
  exec 9>>"$LOCK"
  # The lock belongs to the open file and so outlives this call. Not every system has flock(1), every Python here has fcntl.
  "$BASE" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("waiting for another installation to end", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
'
  wanted=$(pins "$@")
  if [ -s "$LOCK" ] || [ ! -f "$VENV/installed" ] || grep -qvxFf "$VENV/installed" <<<"$wanted"; then
    install "$wanted"
  fi
  exec 9>&-
  PYTHON_BIN=$VENV/bin/python
}
