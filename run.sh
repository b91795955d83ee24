#!/usr/bin/env bash
# bash run.sh        set up; train the demo with SaEI and with plain GRPO; evaluate; write the page
# bash run.sh test   set up; run the tests
# bash run.sh engine set up vLLM for --engine vllm in .venv-engine; run its tests
# Needs Python 3.11 or newer (PYTHON=python3.12 bash run.sh picks one). Writes .venv and out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

setup() { # setup FILE: install its packages into .venv, in the tested versions, once
    local python=${PYTHON:-python3} wanted
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "run.sh: needs Python 3.11 or newer, found $("$python" --version); set PYTHON=..." >&2
        exit 1
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    wanted=$(cat requirements.txt "$1" .ci/constraints.txt)
    if [ "$wanted" != "$(cat ".venv/installed-$1" 2>/dev/null)" ]; then
        echo "Installing $1 into .venv (about 2 minutes and 6 GB) ..."
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            -r "$1" -c .ci/constraints.txt
        echo "$wanted" >".venv/installed-$1"
    fi
}

setup_engine() { # vLLM in an environment of its own, its CPU build where there is no GPU, once
    local python=.venv-engine/bin/python kind=cpu wanted
    local install="$python -m pip install --quiet --disable-pip-version-check"
    if nvidia-smi -L >/dev/null 2>&1; then kind=gpu; fi
    wanted=$(cat .ci/engine-$kind.txt)
    if [ "$wanted" = "$(cat .venv-engine/installed 2>/dev/null)" ]; then return; fi
    echo "Installing vLLM ($kind) into .venv-engine (about 3 minutes and 4 GB) ..."
    "${PYTHON:-python3}" -m venv --clear .venv-engine
    if [ $kind = cpu ]; then # PyTorch's index has the builds without CUDA
        grep ^torch .ci/engine-cpu.txt | xargs $install --no-deps \
            --extra-index-url https://download.pytorch.org/whl/cpu
    fi
    $install -r .ci/engine-$kind.txt
    if [ $kind = cpu ]; then # PyPI's builds of these need CUDA, and vLLM would fail to import them
        $python -m pip uninstall --quiet --yes torchaudio torchcodec
        $python -c "import torchvision" 2>/dev/null || cp .ci/torchvision_without_operators.pth \
            "$($python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
    fi
    echo "$wanted" >.venv-engine/installed
}

launch() { # one process; accelerate launch is for more
    echo "> python $*"
    .venv/bin/python "$@"
}

evaluate() { # evaluate MODEL OUTPUT
    launch eval.py --model "$1" --splits shifted/test plain/test styles/test --problems 500 \
        --output "$2" --overwrite
}

case "${1:-demo}" in
demo)
    echo "The demo takes about 4 minutes on two CPU cores: training with SaEI 2, with plain GRPO 1," \
        "three evaluations 1."
    setup requirements.txt
    launch train_saei.py --config recipes/demo.yaml --output out/demo --overwrite
    launch train_saei.py --config recipes/demo.yaml --output out/demo-grpo --overwrite \
        --intervention none
    evaluate demo/confident out/demo/eval/before
    for run in out/demo out/demo-grpo; do
        evaluate "$(ls -d $run/checkpoints/step-* | tail -n 1)" $run/eval/after
    done
    cp out/demo/eval/before.json* out/demo-grpo/eval/
    .venv/bin/python -m runtime.report out/demo out/demo-grpo >/dev/null
    cat <<END

The page of both runs is $PWD/out/demo/report/index.html
Open it in a browser: file://${PWD// /%20}/out/demo/report/index.html
It is one file that needs no network, so it can be copied from a server and opened elsewhere.
END
    ;;
test)
    echo "The tests take 5 to 8 minutes on two CPU cores."
    setup requirements-dev.txt
    .venv/bin/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal tests
    ;;
engine)
    echo "The engine's tests take about 20 minutes on two CPU cores."
    setup requirements-dev.txt
    setup_engine
    SAEI_ENGINE_TESTS=1 .venv/bin/python -m pytest -q tests/engine
    ;;
*)
    echo "usage: bash run.sh [test | engine]" >&2
    exit 2
    ;;
esac
