#!/usr/bin/env bash
# After a change of requirements/*.txt, for the default stack: writes
# requirements/lock*.txt (versions and hashes of all that is downloaded, for Python
# 3.10 to 3.13), sets up .venv by them, and lists its licences in docs/licences.md.
#
#   bash tools/lock.sh              keeps the versions that may stay
#   bash tools/lock.sh --upgrade    takes the newest that the constraints allow
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TOOL=$(mktemp -d)
trap 'rm -rf "$TOOL"' EXIT
python3 -m venv "$TOOL"
"$TOOL/bin/python" -m pip install -q --disable-pip-version-check uv==0.13.9 pip-licenses==5.5.5

lock() {  # $1: the file to write, the rest: uv's options and what to lock
    (cd requirements && "$TOOL/bin/uv" pip compile --quiet --no-config --universal --python-version 3.10 \
        --generate-hashes --no-annotate --custom-compile-command 'bash tools/lock.sh' \
        -c constraints.txt -o "$@" >/dev/null)
}

lock lock.txt "$@" --no-build build.txt stack.txt openmmlab.txt tools.txt export.txt tests.txt
# Installed one by one, without what they need: mmcv is compiled here, and the
# headless OpenCV takes the other one's place.
for name in mmcv opencv-python-headless; do
    echo "$name" | lock "lock-$name.txt" "$@" --no-deps -
done

bash tools/setup_env.sh
{
    cat <<'MD'
# Licences of what the default stack downloads

As each package states its own; cuda-toolkit states none, and is under [NVIDIA's
EULA](https://docs.nvidia.com/cuda/eula/). Written by `bash tools/lock.sh`, which runs
[pip-licenses](https://pypi.org/project/pip-licenses/) on the environment that it sets
up from `requirements/lock.txt`. mmlavit itself is under Apache-2.0 and contains none of
them.

Wheels hold libraries of others too, under licences of their own. Among them are FFmpeg
and Qt 5 in OpenCV's and GEOS in shapely's (LGPL), and GCC's runtime libraries in those of
numpy, scipy and torch (GPL with GCC's runtime exception; libquadmath LGPL). OpenCV's
headless wheel has no Qt.

MD
    "$TOOL/bin/pip-licenses" --python .venv/bin/python --with-system --from=mixed --with-urls --format=markdown \
        --packages $(sed -nE 's/^([a-z0-9-]+)==.*/\1/p' requirements/lock.txt requirements/lock-mmcv.txt) |
        sed -E '/^\| cuda-toolkit /s/UNKNOWN {17}/NVIDIA CUDA Toolkit EULA/'
} > docs/licences.md
