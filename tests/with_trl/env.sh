#!/bin/sh
# Builds .venv-trl: the published TRL, this project's client for its trainers, and the teacher that they ask. Does
# nothing when it is already there; an environment that was left half built is finished.
#
#   PYTHON=python3 sh tests/with_trl/env.sh [DIRECTORY]
#
# An environment of its own, so that .venv shows that nothing but `vopd_client.trl` needs TRL. There is no vLLM in it.
set -eu

TRL_VERSION=1.16.0

repository=$(cd "$(dirname "$0")/../.." && pwd)
directory=${1:-$repository/.venv-trl}
python=${PYTHON:-python3}
# Changes with every input, so that an environment built from others is brought up to date.
inputs=$(cat "$0" "$repository/pyproject.toml" "$repository/constraints.txt" | cksum)
stamp=$directory/.installed

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$inputs" ]; then
    exit 0
fi

"$python" -m venv "$directory"
pip() { "$directory/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

pip install --constraint "$repository/constraints.txt" torch
# TRL and this project together: one resolution, so that neither breaks the other's bounds. TRL's client of vLLM
# servers needs requests, which TRL does not ask for.
pip install --constraint "$repository/constraints.txt" \
    "trl==$TRL_VERSION" --editable "$repository[server,train]" requests pytest pytest-asyncio pytest-timeout

"$directory/bin/python" -c 'import vopd_client.trl'
printf '%s' "$inputs" > "$stamp"
