#!/bin/sh
# The demo: a teacher in a process of its own, and a student that learns from it over gRPC.
# `make demo` calls this with the demo model; MODEL names any other, here or on a hub.
set -eu
model=${MODEL:?name a model directory or hub id}
here=$(dirname "$0")
# Teacher and student share this machine's cores and take turns: a waiting thread must not spin on one.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
mkdir -p runs
log=runs/demo-teacher.log

if [ -e runs/demo ]; then  # an earlier demo is kept
  mv runs/demo "runs/demo-$(date -r runs/demo +%Y%m%d-%H%M%S)"
fi

: >"$log"  # so that it can be read before the teacher writes to it
vopd-server serve --model "$model" --dtype bfloat16 --port 0 --http-port 0 --admin-port 0 >"$log" 2>&1 &
teacher=$!
trap 'kill "$teacher" 2>/dev/null || true; wait "$teacher" 2>/dev/null || true' EXIT INT TERM

url=
while [ -z "$url" ]; do
  kill -0 "$teacher" 2>/dev/null || { echo "The teacher did not start:" >&2; cat "$log" >&2; exit 1; }
  url=$(sed -n 's|.*\(grpc://[0-9.]*:[0-9]*\).*|\1|p' "$log" | head -n 1)
  sleep 0.2
done
echo "Teacher (process $teacher, log in $log):"
vopd-client info --teacher-url "$url"

vopd-client train --config "$here/run.yaml" --student "$model" --teacher-url "$url"
