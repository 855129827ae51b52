#!/usr/bin/env bash
# Sets up the environment and runs the tests:
#
#   bash tools/test.sh [ARGUMENTS OF pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
export PATH="$PWD/$VENV/bin:$PATH"
# One process a core: small models gain little from threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
status=0
python -m pytest tests -n auto --maxprocesses 8 --dist worksteal "$@" || status=$?
# One of these processes was seen to die at its last test, among native libraries of
# several runtimes. What failed is run once more, in one process that runs nothing else.
if [ $status = 1 ]; then
    status=0
    python -m pytest tests --last-failed --last-failed-no-failures none "$@" || status=$?
fi
exit $status
