# Sourced by run.sh and tests/run.sh with $root set: leaves a virtual environment on PATH that holds requirements.txt.

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

if [ -z "${VIRTUAL_ENV:-}" ]; then
    python=
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if is_recent "$candidate"; then python=$candidate; break; fi
    done
    if [ -z "$python" ]; then
        echo "error: no Python 3.10 or newer on PATH; install python3 (Debian, Ubuntu: apt install python3 python3-venv)" >&2
        exit 1
    fi
    VIRTUAL_ENV=$root/.venv
    if [ ! -x "$VIRTUAL_ENV/bin/pip" ]; then # pip comes last: an interrupted creation is taken up again
        if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "error: $python cannot create virtual environments; install the venv package (Debian, Ubuntu: apt install python3-venv)" >&2
            exit 1
        fi
        echo "creating the virtual environment $VIRTUAL_ENV"
        "$python" -m venv "$VIRTUAL_ENV"
    fi
    export VIRTUAL_ENV
fi
PATH=$VIRTUAL_ENV/bin:$PATH
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PATH PYTHONPATH
if ! is_recent python3; then
    echo "error: the active virtual environment $VIRTUAL_ENV has no Python 3.10 or newer; deactivate it or make another" >&2
    exit 1
fi

installed=$VIRTUAL_ENV/megatron_patch_requirements.txt # what was installed last: the same file again needs no pip
if ! cmp -s "$root/requirements.txt" "$installed"; then
    echo "installing requirements.txt into $VIRTUAL_ENV"
    python3 -m pip install --disable-pip-version-check -r "$root/requirements.txt"
    cp "$root/requirements.txt" "$installed"
fi
