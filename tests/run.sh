#!/bin/sh
# The test suite; arguments go to pytest.
#
#   sh tests/run.sh
#   sh tests/run.sh tests/unit -k checkpoint
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/examples/quickstart/environment.sh"
cd "$root"
exec python3 -m pytest "$@"
