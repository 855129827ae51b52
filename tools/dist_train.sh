#!/usr/bin/env bash
# Trains on several GPUs, or on as many CPU processes where there is no GPU.
#
#   bash tools/dist_train.sh CONFIG GPUS [ARGUMENTS OF tools/train.py]
#
# Several nodes: NNODES, NODE_RANK, MASTER_ADDR and PORT as in the toolboxes.
# MAX_RESTARTS=3 starts all processes anew when one dies, up to 3 times; with
# --resume they go on from the last checkpoint.
set -euo pipefail
source "$(dirname "$0")/dist_common.sh"

[ $# -ge 2 ] || { echo "usage: bash tools/dist_train.sh CONFIG GPUS [ARGUMENTS]" >&2; exit 2; }
launch train.py "$2" "$1" "${@:3}"
