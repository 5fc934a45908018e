#!/bin/sh
# Writes the stubs of teacher.proto into the directory given (default: proto/vopd_proto).
# The virtual path vopd_proto=proto makes the generated modules import one another as a package.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here}
"${PYTHON:-python}" -m grpc_tools.protoc "-Ivopd_proto=$here" \
  "--python_out=$out" "--pyi_out=$out" "--grpc_python_out=$out" vopd_proto/teacher.proto
