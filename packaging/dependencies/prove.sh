#!/bin/sh
# Install the project with EXTRAS into a fresh virtual environment made by PYTHON and run each runtime on real models.
#
#   packaging/dependencies/prove.sh PYTHON EXTRAS DATA_FOLDER AD01_ONNX [RUNTIME ...]
#
# e.g. prove.sh python3.12 all ../shared/data /tmp/ad01.onnx litert onnx openvino
# The environment lies in a temporary folder and is removed afterwards. Exit status 0: everything named did run.
set -eu
[ $# -ge 4 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
python=$1 extras=$2 data=$3 onnx=$4
shift 4
here=$(cd "$(dirname "$0")" && pwd)
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT INT TERM
"$python" -m venv "$room/venv"
# A copy, so that building leaves nothing in the tree.
mkdir "$room/source"
(cd "$here/../.." && cp -R pyproject.toml README.md LICENSE agent ota device-profiles "$room/source/")
"$room/venv/bin/python" -m pip install --quiet "$room/source[$extras]"
"$room/venv/bin/python" -m pip check
cd "$room" # away from the checkout: only what was installed counts
OPENBLAS_NUM_THREADS=1 ORT_DISABLE_TELEMETRY=1 "$room/venv/bin/python" "$here/run_runtimes.py" "$data" "$onnx" "$@"
