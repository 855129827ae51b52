#!/usr/bin/env bash
# From a fresh clone to a trained and tested detector, with pictures:
#
#   bash tools/demo.sh            6 to 11 minutes on 2 CPU cores after set-up
#   bash tools/demo.sh --short    about 2 minutes: a few iterations, save, resume, test
#
# Safe to run again: it goes on where it was cut off.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
export PATH="$PWD/$VENV/bin:$PATH"

mkdir -p work_dirs
exec 9>work_dirs/demo.lock  # also held by what the demo starts
flock -n 9 || {
    echo "Another demo is running here, or its training still is (ps x | grep work_dirs/demo)." >&2
    echo 'Wait for it or end it, and run the same command again.' >&2
    exit 1
}

CONFIG=configs/retinanet_lavit_digits.py
WORK_DIR=work_dirs/demo
PORT=${PORT:-$((20000 + RANDOM % 20000))}
export PORT
train() { bash tools/dist_train.sh "$CONFIG" 1 --work-dir "$WORK_DIR" --resume "$@"; }
test_last() {
    rm -rf "$WORK_DIR/test"
    bash tools/dist_test.sh "$CONFIG" "$(cat "$WORK_DIR/last_checkpoint")" 1 \
        --work-dir "$WORK_DIR/test" --show-dir pictures "$@"
}
title() { printf '\n=== %s ===\n' "$*"; }

title 'Data: real scanned digits on textured backgrounds (seconds)'
python tools/make_digits.py data/digits

if [ "${1:-}" = --short ]; then
    WORK_DIR=work_dirs/demo-short
    rm -rf "$WORK_DIR"
    # Hardly trained, it scores everything low: keep all detections.
    FEW=(train_dataloader.dataset.indices=24 val_dataloader.dataset.indices=10
         train_cfg.val_interval=1 model.test_cfg.score_thr=0.0)
    title 'Training 6 iterations, and 6 more from the checkpoint'
    train --cfg-options "${FEW[@]}" train_cfg.max_epochs=1
    train --cfg-options "${FEW[@]}" train_cfg.max_epochs=2
    title 'Testing the checkpoint'
    test_last --cfg-options test_dataloader.dataset.indices=10 model.test_cfg.score_thr=0.0
    python tools/demo_report.py "$WORK_DIR" --epochs 2
    exit
fi

# A run of other code or data is no start for this one.
made_by=$(cat mmlavit/*.py configs/retinanet*.py data/digits/dataset.json | cksum)
[ "$(cat "$WORK_DIR/made_by" 2>/dev/null)" = "$made_by" ] || rm -rf "$WORK_DIR"
mkdir -p "$WORK_DIR"
echo "$made_by" > "$WORK_DIR/made_by"

title "Training: $CONFIG (6 to 10 minutes on 2 CPU cores)"
train
title 'Testing the checkpoint'
test_last
python tools/demo_report.py "$WORK_DIR" --min-ap 0.60 --min-ap50 0.80
