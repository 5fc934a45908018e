#!/bin/sh
# Builds .venv-trl: the published TRL on top of what is in .venv, this project and the teacher included. Does nothing
# when it is already there; an environment that was left half built is finished.
#
#   PYTHON=python3 sh tests/with_trl/env.sh [DIRECTORY [BASE]]
#
# An environment of its own, so that .venv shows that nothing but `vopd_client.trl` needs TRL. Both would have the same
# versions of everything else (constraints.txt), so BASE's packages are used where they are: seconds instead of minutes.
set -eu

TRL_VERSION=1.16.0

repository=$(cd "$(dirname "$0")/../.." && pwd)
directory=${1:-$repository/.venv-trl}
base=$(cd "${2:-$repository/.venv}" && pwd)
python=${PYTHON:-python3}
# Changes with every input, so that an environment built from others is brought up to date.
inputs=$(cat "$0" "$repository/pyproject.toml" "$repository/constraints.txt" | cksum)
stamp=$directory/.installed

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$inputs" ]; then
    exit 0
fi

"$python" -m venv --clear "$directory"
packages_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
printf 'import site; site.addsitedir("%s")\n' "$(packages_of "$base")" > "$(packages_of "$directory")/base.pth"

# TRL's client of vLLM servers needs requests, which TRL does not ask for.
"$directory/bin/python" -m pip --disable-pip-version-check --quiet install \
    --constraint "$repository/constraints.txt" "trl==$TRL_VERSION" requests

"$directory/bin/python" -c 'import vopd_client.trl'
printf '%s' "$inputs" > "$stamp"
