#!/usr/bin/env bash
# From nothing to a model that writes: bash launch/demo.sh [WORKDIR]      (default: runs/demo of this repository)
# Makes .venv, trains configs/pystdlib.py on Python's standard library, continues a text, fills a gap and prints where all is.
# After an interruption it goes on where it stopped; after the end it only samples again. PYTHON and LLADA_PYTHON: see setup.sh.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/setup.sh"

case "${1:-}" in
  -*) die "$1 is not known; run: $AGAIN [WORKDIR]" ;;
  "") workdir=$ROOT/runs/demo ;;
  /* | *://*) workdir=$1 ;;
  *) workdir=$PWD/$1 ;;
esac
[ $# -le 1 ] || die "one WORKDIR at most, but there are $# arguments; run: $AGAIN [WORKDIR]"

set_up
cd -- "$ROOT"
export PYTHONUNBUFFERED=1
trap 'exit 130' INT # training saves and ends well when it is interrupted: do not go on to sample then

"$PYTHON_BIN" -m llada_jax.train --config=configs/pystdlib.py --workdir="$workdir"
"$PYTHON_BIN" -m llada_jax.sample --workdir="$workdir" --num_samples=3 --decoder.temperature=0.5
"$PYTHON_BIN" -m llada_jax.sample --workdir="$workdir" --infill=$'def add(a, b):\n<|mask:24|>\n    return result\n'

echo
echo "run folder   $workdir"
echo "curves       $workdir/curves.png"
for page in "$workdir"/samples/*.html; do
  [ ! -e "$page" ] || echo "decode page  $page"
done
