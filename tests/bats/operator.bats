#!/usr/bin/env bats
# How an operator scripts checks around a launcher: its exit status, its one sentence, its plan as JSON.
#
#   bats tests/bats

bats_require_minimum_version 1.5.0

setup() {
    root=$(CDPATH='' cd -- "$BATS_TEST_DIRNAME/../.." && pwd)
    launcher="$root/examples/mistral/run_mcore_mistral.sh"
    mkdir "$BATS_TEST_TMPDIR/elsewhere" && cd "$BATS_TEST_TMPDIR/elsewhere" || return
    export MP_DRY_RUN=1
}

# The documented pre-training command; each NUMBER=VALUE replaces a positional argument.
command_line() {
    local given=(
        dsw 7B 1 8 1e-5 1e-6 128 128 bf16 4 1 1 1 true true true false false false 100000
        data/wudao_mistralbpe_content_document data/wudao_mistralbpe_content_document
        checkpoints/Mistral-7B-v0.1-to-mcore-tp4-pp1 10000 100 output
    )
    local change
    for change in "$@"; do given[${change%%=*} - 1]=${change#*=}; done
    printf '%s\n' "${given[@]}"
}

launch() {
    local given
    mapfile -t given < <(command_line "$@")
    run --separate-stderr sh "$launcher" "${given[@]}"
}

# One field of the plan on standard output: `field parallel world`.
field() {
    python3 -c 'import functools, json, sys
print(functools.reduce(lambda value, name: value[name], sys.argv[1:], json.load(sys.stdin)))' "$@" <<<"$output"
}

@test "a plan is one JSON object on standard output, and the table stands on standard error" {
    launch
    [ "$status" -eq 0 ]
    [ "$(field schedule train_iters)" -eq 9 ]
    [ "$(field model parameters)" -eq 7241732096 ]
    [[ "$stderr" == *train_iters* ]]
}

@test "planning creates nothing" {
    launch
    [ -z "$(ls -A)" ]
}

@test "a queue can ask for exactly the ranks that a run needs" {
    launch 10=8 11=2
    [ "$(field parallel world)" -eq 16 ]
}

@test "a script can stop before a run that would not fit its token budget" {
    launch 24=1_000_000_000
    [ "$(field schedule tokens)" -gt 900000000 ]
}

@test "a wrong value ends with status 2 and a sentence that names the argument" {
    launch 9=bf17
    [ "$status" -eq 2 ]
    [ -z "$output" ]
    [[ "$stderr" == *"argument 9 (PR)"* ]]
}

@test "an argument that slipped by one place is caught" {
    mapfile -t given < <(command_line)
    unset 'given[3]'
    run --separate-stderr sh "$launcher" "${given[@]}"
    [ "$status" -eq 2 ]
    [[ "$stderr" == *25* ]]
}

@test "sizes that do not divide are told all at once" {
    launch 10=3 11=5
    [ "$status" -eq 2 ]
    [[ "$stderr" == *"TP (argument 10)"* ]]
    [[ "$stderr" == *"PP (argument 11)"* ]]
}

@test "no part of an argument is run by the shell" {
    launch '26=$(touch hacked)' '21=`touch hacked`'
    [ "$status" -eq 0 ]
    [ ! -e hacked ]
    [ "$(field arguments OUTPUT_BASEPATH)" = '$(touch hacked)' ]
}

@test "an option after the positionals changes the plan, and an unknown one is refused with the nearest name" {
    mapfile -t given < <(command_line)
    run --separate-stderr sh "$launcher" "${given[@]}" --eval-interval 7
    [ "$(field schedule eval_interval)" -eq 7 ]
    run --separate-stderr sh "$launcher" "${given[@]}" --eval-intervall 7
    [ "$status" -eq 2 ]
    [[ "$stderr" == *--eval-interval* ]]
}

@test "several nodes: the first missing variable is named before anything starts" {
    unset WORLD_SIZE RANK MASTER_ADDR MASTER_PORT NPROC_PER_NODE KUBERNETES_CONTAINER_RESOURCE_GPU
    launch 1=dlc
    [ "$status" -eq 2 ]
    [[ "$stderr" == *MASTER_ADDR* ]]
    WORLD_SIZE=2 RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 NPROC_PER_NODE=4 launch 1=dlc
    [ "$(field parallel world)" -eq 8 ]
}
