#!/usr/bin/env bash
# Sets up the environment and runs the tests:
#
#   bash tools/test.sh [ARGUMENTS OF pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
export PATH="$PWD/$VENV/bin:$PATH"
# One process a core: small models gain little from threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@" | tee "$log" || status=$?
# One of these processes was seen to die at its last test; the cause is not known. Where
# that is all that failed, those tests run once more, in one process. Others stay failed.
died=$(grep -c "^worker 'gw.*' crashed while running" "$log" || true)
failed=$(grep -cE '^(FAILED|ERROR) ' "$log" || true)
if [ $status = 1 ] && [ "$died" -gt 0 ] && [ "$died" = "$failed" ]; then
    status=0
    python -m pytest --last-failed --last-failed-no-failures none "$@" || status=$?
fi
exit $status
