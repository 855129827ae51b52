#!/usr/bin/env bash
# From a fresh clone to a trained and tested detector, with pictures:
#
#   bash tools/demo.sh              5 to 18 minutes on 2 CPU cores after set-up
#   bash tools/demo.sh --short      about 2 minutes: a few iterations, save, resume, test
#   bash tools/demo.sh --verbose    with all that the steps print; else it is in demo.log
#
# Safe to run again: it goes on where it was cut off.
set -euo pipefail
for option; do
    case $option in
        --short) ;;
        --verbose) export VERBOSE=1 ;;
        *) echo 'usage: bash tools/demo.sh [--short] [--verbose]' >&2; exit 2 ;;
    esac
done
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
export PATH="$PWD/$VENV/bin:$PATH"

mkdir -p work_dirs
exec 9>work_dirs/demo.lock  # also held by what the demo starts
flock -n 9 || {
    echo "Another demo is running here, or its training still is (ps x | grep work_dirs/demo)." >&2
    echo 'Wait for it or end it, and run the same command again.' >&2
    exit 1
}
exec python tools/demo.py "$@"
