#!/bin/sh
# The whole walk on one CPU machine: corpus, tokenizer, conversion, pre-training, fine-tuning, conversion back, scores.
#
#   sh examples/quickstart/run.sh                  # results in quickstart_output/ of this checkout
#   sh examples/quickstart/run.sh /tmp/first-walk  # … or in a directory of your choice
#
# It prints every command before running it, and a second run reuses what the first one made.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
. "$root/examples/quickstart/environment.sh"
exec python3 -m examples.quickstart.walk "$@"
