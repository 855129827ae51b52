#!/usr/bin/env bash
# Runs mmlavit on one GPU and writes a page of what it says, to be put into
# docs/reports/: CUDA operators, tests, benchmarks, a training, profiles.
#
#   bash tools/gpu_report.sh [--out DIR] [--minutes N] [--try-on-cpu]
#
# Needs the stack installed and no network. At most 20 minutes; run again, it goes on
# where it stopped. Without a GPU it says so and exits with 2.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python)}
exec "$PYTHON" -m mmlavit.analysis.gpu_report "$@"
