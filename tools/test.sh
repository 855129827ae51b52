#!/usr/bin/env bash
# Sets up the environment and runs the tests:
#
#   bash tools/test.sh [ARGUMENTS OF pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
export PATH="$PWD/$VENV/bin:$PATH"
python -m pytest tests "$@"
