#!/usr/bin/env bash
# Sets up the environment and runs the tests:
#
#   bash tools/test.sh [ARGUMENTS OF pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
export PATH="$PWD/$VENV/bin:$PATH"
# One process a core: small models gain little from threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
