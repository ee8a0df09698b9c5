#!/usr/bin/env bash
# Install Debian's Chromium, in which `make check-browser` tries the studio's page.
# Fails where there is none and none can be installed: the tests must not pass by being skipped.
set -euo pipefail
chromium=${CHROMIUM:-/usr/bin/chromium}
if [ ! -x "$chromium" ] && [ -z "${CHROMIUM:-}" ]; then
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
    echo "the browser tests need Chromium: 'apt-get install chromium', or CHROMIUM=/path/to/it" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get -o Acquire::Retries=3 -qq update
  apt-get -o Acquire::Retries=3 -qq -y install --no-install-recommends chromium fonts-dejavu-core > /dev/null
fi
"$chromium" --version
