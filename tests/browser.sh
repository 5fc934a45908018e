#!/bin/sh
# Chromium and promtool, which some tests drive: browser.sh DIRECTORY, where promtool is put if it is nowhere.
#
# Of Debian's package prometheus only promtool is taken: installed, it would start a service, on a teacher's admin port.
set -eu
bin=$1

find_chromium() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
find_promtool() { PATH="$bin:$PATH" command -v promtool; }

if find_chromium >/dev/null && find_promtool >/dev/null; then
  exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  cat >&2 <<EOF
The tests need Chromium and promtool, and this is not root, or there is no apt-get, to install them.
Put them on the PATH: the packages are chromium and prometheus on Debian and its like; promtool is also in the
archives at https://prometheus.io/download.
EOF
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq -o Acquire::Retries=3
if ! find_chromium >/dev/null; then
  apt-get install -qq -o Acquire::Retries=3 --yes --no-install-recommends chromium >/dev/null
fi
if ! find_promtool >/dev/null; then
  package=$(mktemp -d)
  trap 'rm -r "$package"' EXIT
  chown _apt "$package" || true  # as whom apt-get downloads
  (cd "$package" && apt-get download -qq -o Acquire::Retries=3 prometheus)
  dpkg-deb --fsys-tarfile "$package"/prometheus_*.deb | tar -x -C "$bin" --strip-components=3 ./usr/bin/promtool
fi
