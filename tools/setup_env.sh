#!/usr/bin/env bash
# Makes .venv with the pinned stack and mmlavit in it. Safe to run again: what
# is done is skipped, what was cut off goes on.
#
#   bash tools/setup_env.sh
#   PYTHON=python3.12 bash tools/setup_env.sh     another interpreter
#   TOOLBOXES=mmpretrain bash tools/setup_env.sh  classification alone: no compiler,
#                                                 in .venv-mmpretrain
#   MMCV_CUDA_OPS=0 bash tools/setup_env.sh       CPU ops although a GPU is there
#   MMCV_CUDA_OPS=build bash tools/setup_env.sh   CUDA ops although no GPU is there,
#                                                 as where an image is built
#   HASHES=0 bash tools/setup_env.sh              files by version alone, as from an
#                                                 index of builds of your own
#   STACK=onedl bash tools/setup_env.sh           the OneDL forks, in .venv-onedl
#   STACK=latest bash tools/setup_env.sh          the newest torch, with these
#                                                 forks, in .venv-latest
#   STACK=oldest bash tools/setup_env.sh          torch 2.1 and its time's
#                                                 libraries, in .venv-oldest
#   VERBOSE=1 bash tools/setup_env.sh             all that pip prints; else it is
#                                                 in .venv/setup.log
#
# tools/demo.sh and tools/test.sh source this file and then run in .venv.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
STACK=${STACK:-openmmlab}
TOOLBOXES=${TOOLBOXES:-all}

say() { printf '[setup %s] %s\n' "$(date +%H:%M:%S)" "$*"; }
die() { printf '\n[setup] ERROR: %s\n' "$*" >&2; exit 1; }

# $NAMES: the toolboxes, a file in requirements. $LOCK: what they and all that they
# need hash to. $CXX_STANDARD: what torch's headers want where mmcv asks for less.
VENV=.venv-$STACK NAMES=openmmlab MMCV=mmcv PINS=requirements/constraints.txt LOCK=
IMPORTS='mmdet, mmseg, mmpretrain' FIRST_PYTHON=10 LAST_PYTHON=12 CXX_STANDARD=
case $STACK/$TOOLBOXES in
    openmmlab/all) VENV=.venv LOCK=requirements/lock.txt ;;
    openmmlab/mmpretrain) VENV=.venv-mmpretrain NAMES=mmpretrain MMCV=mmcv-lite IMPORTS=mmpretrain LAST_PYTHON=13 ;;
    onedl/all) NAMES=onedl MMCV=onedl-mmcv ;;
    latest/all) NAMES=onedl MMCV=onedl-mmcv PINS=requirements/constraints-latest.txt FIRST_PYTHON=11 CXX_STANDARD=20 ;;
    oldest/all) PINS=requirements/constraints-oldest.txt LAST_PYTHON=11 ;;
    */all) die "STACK=$STACK is not known. Choose openmmlab (the default), onedl, latest or oldest." ;;
    *) die "TOOLBOXES=$TOOLBOXES with STACK=$STACK is not known. Choose TOOLBOXES=all (the default), or TOOLBOXES=mmpretrain with STACK=openmmlab." ;;
esac
case ${HASHES:=1} in
    0) LOCK= ;;
    1) ;;
    *) die "HASHES=$HASHES is not known. Choose 1 (the default) or 0." ;;
esac
case ${MMCV_CUDA_OPS:=1} in
    0|1|build) ;;
    *) die "MMCV_CUDA_OPS=$MMCV_CUDA_OPS is not known. Choose 1 (CUDA ops where there is a GPU, the default), 0 or build." ;;
esac
STAMP=$VENV/.mmlavit-setup

STEP='the start'
step() { STEP=$1; say "$1"; }
on_error() {
    printf '\n[setup] FAILED at: %s\n' "$STEP" >&2
    printf '[setup] Fix what the lines above report, then run the same command again. It goes on from here.\n' >&2
    printf '[setup] To start over, remove %s first.\n' "$VENV" >&2
}

pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off -c "$PINS" "$@" | show_pip
}

# Of pip's hundreds of lines only downloads of 10 MB and more are news.
show_pip() {
    tee -a "$VENV/setup.log" | if [ "${VERBOSE:-}" ]; then cat; else
        sed -unE 's|^ *(Downloading [^ ]+ \([0-9]{2,}\.[0-9] MB\)).*|    \1|p'
    fi
}

# One package, by its hashes where the stack has them.
locked() { if [ -n "$LOCK" ]; then echo "--require-hashes -r requirements/lock-$1.txt"; else echo "$1"; fi; }

# Gigabytes into the installation is late to learn that the disk is too small.
check_space() {  # $1: folder, $2: GiB, $3: for what, $4: another way out
    local free; free=$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$2" ] || die "Only $free GiB are free in $1, and $3 needs $2. Make room and run the same command again${4:-}."
}

# The kind of ops to build: CUDA ops take a GPU that torch can use and an nvcc of
# torch's CUDA version; else there are CPU ops, with a word on why.
choose_ops() {
    if [ "$MMCV_CUDA_OPS" = build ]; then
        echo cuda
    elif [ "$MMCV_CUDA_OPS" = 1 ] && nvidia-smi -L >/dev/null 2>&1; then
        "$VENV/bin/python" - "$VENV" <<'PY'
import re, subprocess, sys, torch
from torch.utils.cpp_extension import CUDA_HOME

def cpu(why):
    print('    There is a GPU, but mmcv gets CPU ops:', why, file=sys.stderr)
    print(f'    Detectors will not run on the GPU. Fix that, remove {sys.argv[1]} and run this again.', file=sys.stderr)
    sys.exit(print('cpu'))

if not torch.cuda.is_available():
    cpu(f'torch {torch.__version__} cannot use it; is the driver new enough for CUDA {torch.version.cuda}?')
if CUDA_HOME is None:
    cpu(f'no nvcc; install the CUDA {torch.version.cuda} toolkit or set CUDA_HOME.')
text = subprocess.run([f'{CUDA_HOME}/bin/nvcc', '--version'], capture_output=True, text=True).stdout
found = re.search(r'release (\d+)', text)
if not found or found[1] != torch.version.cuda.split('.')[0]:
    cpu(f'the nvcc in {CUDA_HOME} is not of CUDA {torch.version.cuda}; set CUDA_HOME to one that is.')
print('cuda')
PY
    else
        echo cpu
    fi
}

# mmcv installs "successfully" without its ops, and pip may serve a cached wheel
# built for another torch or without CUDA. Only running an op tells.
check_mmcv_ops() {
    "$VENV/bin/python" - "$1" <<'PY'
import sys
import torch
from mmcv.ops import get_compiling_cuda_version, nms
boxes = torch.tensor([[0., 0., 4., 4.], [0., 0., 4., 3.9], [5., 5., 9., 9.]])
scores = torch.tensor([.9, .8, .7])
assert sys.argv[1] == 'cpu' or get_compiling_cuda_version() != 'not available'
for device in ['cpu'] + ['cuda'] * (sys.argv[1] == 'cuda' and torch.cuda.is_available()):
    keep = nms(boxes.to(device), scores.to(device), 0.5)[1]
    assert keep.tolist() == [0, 2], (device, keep)
PY
}

# pip shows nothing of a ten-minute compilation; ninja's counter does.
show_build() {
    tee "$VENV/mmcv-build.log" | sed -unE \
        -e 's|^ *(\[[0-9]*0/[0-9]+\]) .*|    compiled \1 files|p' \
        -e 's|^ *(Using cached .*)|    \1|p' -e 's|^ *(Successfully installed .*)|    \1|p'
}

install_mmcv() {  # $1: cpu | cuda, the rest: pip's options
    local ops=$1; shift
    # Without debug symbols, which take two thirds of the time.
    local settings=(MMCV_WITH_OPS=1 CFLAGS="${CFLAGS:-} -g0" CXXFLAGS="${CXXFLAGS:-} -g0")
    # mmcv builds CUDA ops wherever torch sees a GPU: hide it for CPU ops.
    case $ops/$MMCV_CUDA_OPS in
        cuda/build) settings+=(FORCE_CUDA=1) ;;
        cpu/*) settings+=(CUDA_VISIBLE_DEVICES=) ;;
    esac
    # The build names a C++ standard itself, and the last one counts: put ours behind it.
    if [ -n "$CXX_STANDARD" ]; then
        printf '#!/bin/sh\nexec %s "$@" -std=c++%s\n' "${CXX:-c++}" "$CXX_STANDARD" > "$VENV/c++"
        chmod +x "$VENV/c++"
        settings+=(CXX="$PWD/$VENV/c++" NVCC_APPEND_FLAGS="-std=c++$CXX_STANDARD")
    fi
    env "${settings[@]}" "$VENV/bin/python" -m pip install --disable-pip-version-check -c "$PINS" \
        -v --no-build-isolation --no-deps "$@" $(locked "$MMCV") 2>&1 | show_build \
        || { tail -n 40 "$VENV/mmcv-build.log" >&2; return 1; }
}

# With CPU ops a detector on the GPU would stop at its first NMS.
hide_unusable_gpu() {
    if [ "$(tail -n 1 "$STAMP")" = cpu ]; then export CUDA_VISIBLE_DEVICES=; fi
}

python_version() { "$1" -c 'import sys; print(sys.version)' | tr '\n' ' '; }

check_python() {
    command -v "$PYTHON" >/dev/null || die "$PYTHON is not there. Install Python 3.$FIRST_PYTHON to 3.$LAST_PYTHON, or name one: PYTHON=/path/to/python3.11 bash tools/setup_env.sh"
    "$PYTHON" -c "import sys; sys.exit(not (3, $FIRST_PYTHON) <= sys.version_info[:2] <= (3, $LAST_PYTHON))" \
        || die "$("$PYTHON" --version 2>&1) found, but this stack needs Python 3.$FIRST_PYTHON to 3.$LAST_PYTHON. Name one: PYTHON=/path/to/python3.11 bash tools/setup_env.sh"
}

make_venv() {
    if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 \
        && [ "$(python_version "$VENV/bin/python")" = "$(python_version "$PYTHON")" ]; then return; fi
    "$PYTHON" -m venv --clear "$VENV" \
        || die "$PYTHON cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"
}

install_libraries() {
    if [ -n "$LOCK" ]; then
        pip_install --require-hashes --only-binary :all: -r "$LOCK"
    else
        say "This stack is pinned by versions in $PINS, without hashes."
        pip_install -r requirements/build.txt
        pip_install -r requirements/stack.txt -r requirements/$NAMES.txt -r requirements/tools.txt -r requirements/export.txt -r requirements/tests.txt
    fi
    # opencv-python needs libGL, which servers and containers often lack.
    "$VENV/bin/python" -c 'import cv2' 2>/dev/null || {
        say 'cv2 does not import here (no libGL?). Taking opencv-python-headless instead.'
        pip_install --force-reinstall --no-deps $(locked opencv-python-headless)
    }
}

make_env() {  # $1: what the stamp is to say
    if [ "$MMCV" = mmcv-lite ]; then
        say "Setting up $VENV: about 2 minutes the first time, most of it for downloads."
    else
        say "Setting up $VENV: about 10 minutes on 2 cores the first time, most of it for compiling mmcv's ops."
    fi
    step "1/5 virtual environment ($("$PYTHON" --version 2>&1))"
    make_venv

    [ -d "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch" ] || {
        check_space . 9 'the environment with its downloads'
        check_space "${TMPDIR:-/tmp}" 3 'what pip downloads' ', or name another folder: TMPDIR=/path bash tools/setup_env.sh'
    }
    step "2/5 torch, $IMPORTS (1 to 5 minutes, 3 GB to download)"
    install_libraries

    local ops=none
    if [ "$MMCV" = mmcv-lite ]; then
        step '3/5 and 4/5 are skipped: mmcv-lite has no ops to compile'
    else
        ops=$(choose_ops)
        step "3/5 $MMCV with $ops ops (about 7 minutes on 2 cores; seconds if pip has the wheel in its cache)"
        install_mmcv "$ops"

        step '4/5 checking that mmcv.ops runs'
        check_mmcv_ops "$ops" || {
            say "This mmcv has no usable ops. Compiling it again, without pip's cache."
            install_mmcv "$ops" --no-cache-dir --force-reinstall
            check_mmcv_ops "$ops"
        }
    fi

    step '5/5 mmlavit'
    pip_install --no-build-isolation --no-deps -e .
    "$VENV/bin/python" -c "import mmlavit, $IMPORTS; print('    mmlavit', mmlavit.__version__)"
    "$VENV/bin/python" -m pip check || say "pip check reports the conflicts above: $VENV holds something that does not fit this stack."

    printf '%s\n%s\n' "$1" "$ops" > "$STAMP"
    say "Done. To work in it: source $VENV/bin/activate"
}

# In a function, so that the shell has read it whole before anything changes.
setup_env() {
    trap on_error ERR
    set -E

    check_python
    local wanted
    wanted="$(python_version "$PYTHON") $(cat requirements/*.txt setup.py tools/setup_env.sh | cksum)"
    wanted="$wanted $MMCV_CUDA_OPS $HASHES $PWD"
    # Elsewhere the ops do not depend on whether there is a GPU.
    if [ "$MMCV_CUDA_OPS" = 1 ]; then
        wanted="$wanted $({ nvidia-smi -L 2>/dev/null || true; } | wc -l)"
    fi
    if [ "$(head -n 1 "$STAMP" 2>/dev/null)" = "$wanted" ]; then
        say "$VENV is up to date."
    else
        make_env "$wanted"
    fi
    hide_unusable_gpu

    trap - ERR
    set +E
}

setup_env
