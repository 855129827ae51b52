#!/usr/bin/env bash
# Tests on several GPUs, or on as many CPU processes where there is no GPU.
#
#   bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [ARGUMENTS OF tools/test.py]
#
# Several nodes: NNODES, NODE_RANK, MASTER_ADDR and PORT as in the toolboxes.
set -euo pipefail
source "$(dirname "$0")/dist_common.sh"

[ $# -ge 3 ] || { echo "usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [ARGUMENTS]" >&2; exit 2; }
launch test.py "$3" "$1" "$2" "${@:4}"
