#!/usr/bin/env bash
# bash run.sh        set up, train the demo with SaEI and with plain GRPO, evaluate before and after, write the page
# bash run.sh test   set up and run the tests
# Needs Python 3.11 or newer (PYTHON=python3.12 bash run.sh picks one). Everything lands in .venv and out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

setup() { # setup FILE: a virtual environment with what FILE lists, made or brought up to date only when FILE changed
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "run.sh: needs Python 3.11 or newer, found $("$python" --version); set PYTHON=..." >&2
        exit 1
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    if ! cat requirements.txt "$1" | cmp -s - ".venv/installed-$1"; then
        echo "Installing $1 into .venv ..."
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
        cat requirements.txt "$1" >".venv/installed-$1"
    fi
}

launch() { # one process on this machine; `accelerate config` and plain `accelerate launch` are for more
    .venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "$@"
}

case "${1:-demo}" in
demo)
    setup requirements.txt
    splits=(shifted/test plain/test styles/test)
    launch train_saei.py --config recipes/demo.yaml --output out/demo --overwrite
    launch train_saei.py --config recipes/demo.yaml --output out/demo-grpo --overwrite --intervention none
    for run in out/demo out/demo-grpo; do
        last=$(ls -d $run/checkpoints/step-* | tail -n 1)
        launch eval.py --model "$last" --splits "${splits[@]}" --problems 500 --output $run/eval/after
    done
    launch eval.py --model demo/confident --splits "${splits[@]}" --problems 500 --output out/demo/eval/before
    cp out/demo/eval/before.json* out/demo-grpo/eval/
    .venv/bin/python -m runtime.report out/demo out/demo-grpo
    ;;
test)
    setup requirements-dev.txt
    .venv/bin/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal tests
    ;;
*)
    echo "usage: bash run.sh [test]" >&2
    exit 2
    ;;
esac
