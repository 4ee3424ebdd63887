#!/bin/sh
# The document's spelling of examples/qwen1_5/run_pretrain_megablocks_qwen.sh, where its 25 positionals are told.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch qwen-megablocks-pretrain "$@"
