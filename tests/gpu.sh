#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under ten minutes: correctness first, then measurements. The machine needs
# an NVIDIA GPU with its driver, bash, and the CUDA libraries (below); no network, no Rust, no compiler.
#
#   tests/gpu.sh build FOLDER        where Rust is: builds what is run and puts it into FOLDER, and packed into
#                                    FOLDER.tar.xz. With the environment of `tools/cuda-toolchain.sh` it serves all machines.
#   tests/gpu.sh run FOLDER [OUT]    where the GPU is: runs it. Logs of the parts and `summary.txt` go to OUT (gpu-results
#                                    unless given). Exit status 1 if a part failed.
#
# cuBLAS and cuRAND (and NCCL for several ranks) are found through LD_LIBRARY_PATH, the system's loader, or the
# nvidia/* packages of the `python3` on the PATH. The whole takes GPU_SECONDS (570 unless set) at most: parts for which no
# time is left are skipped, and the summary says so.
set -uo pipefail

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 2
}

# ---- The parts: one line each ---------------------------------------------------------------------------------------
# part KIND SECONDS NAME COMMAND...   KIND is `right` (correctness) or `fast` (a measurement); SECONDS is the most it may
# take. A command's status says whether it passed; 77 means that this machine cannot run it. Commands run in FOLDER, with
# their output in OUT/NAME.log.
parts() {
    part right 20 machine describe_machine
    part right 180 unit-tests env DBLAUNCH_TEST_GPU=1 ./dblaunch-tests --test-threads 4 cuda gpu kernels:: on_device
    part right 150 training-wherever-states-rest env DBLAUNCH_TEST_GPU=1 ./dblaunch-it --test-threads 4 accelerator::
    part right 20 no-gpu-is-told told 2 "shows no GPU" env CUDA_VISIBLE_DEVICES= ./dblaunch bench gpu
    part right 30 one-gpu-for-two-is-told told 2 "were given the same GPU" env CUDA_VISIBLE_DEVICES=0 ./dblaunch bench gpu --nproc 2
    part right 90 two-ranks-over-nccl env DBLAUNCH_SHARE_GPU=1 ./dblaunch bench gpu --nproc 2
    part right 60 a-failing-rank-ends-the-others told 1 "failed on purpose" env DBLAUNCH_SHARE_GPU=1 ./dblaunch bench gpu --nproc 2 --fail
    part fast 60 gpu ./dblaunch bench gpu
    part fast 60 kernels ./dblaunch bench kernels
    part fast 90 all-gpus on_all_gpus
}

describe_machine() {
    nvidia-smi || return 77
    nvidia-smi topo -m 2> /dev/null
    ls -l
    echo "LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}"
}

# told STATUS WORDS COMMAND...: the command says these words and ends with this status.
told() {
    local status=$1 words=$2 said
    shift 2
    said=$("$@" 2>&1)
    local ended=$?
    printf '%s\n' "$said"
    [ "$ended" = "$status" ] || { echo "exit status $ended instead of $status"; return 1; }
    case $said in *"$words"*) ;; *) echo "it does not say: $words"; return 1 ;; esac
}

on_all_gpus() {
    local count
    count=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU')
    [ "${count:-0}" -gt 1 ] || { echo "there is one GPU"; return 77; }
    ./dblaunch bench gpu --nproc "$count"
}

# ---- Building -------------------------------------------------------------------------------------------------------
build() {
    local folder=$1 tests unit it
    cd "$(dirname "$0")/.." || exit 1
    mkdir -p "$folder" || exit 1
    cargo build --locked --release --features cuda || exit 1
    tests=$(cargo test --locked --release --features cuda --lib --test it --no-run 2>&1 | tee /dev/stderr)
    unit=$(sed -n 's/.*Executable unittests .*(\(.*\))$/\1/p' <<< "$tests")
    it=$(sed -n 's/.*Executable tests.it.main.rs (\(.*\))$/\1/p' <<< "$tests")
    [ -x "$unit" ] && [ -x "$it" ] || { echo "gpu.sh: cargo did not say where the tests are" >&2; exit 1; }
    cp target/release/dblaunch "$folder/dblaunch" && cp "$unit" "$folder/dblaunch-tests" && cp "$it" "$folder/dblaunch-it" || exit 1
    strip "$folder"/dblaunch* 2> /dev/null
    # What commands and tests read: configurations, the demo, recorded data.
    cp -r configs demo "$folder/" && mkdir -p "$folder/tests" && cp -r tests/data "$folder/tests/" || exit 1
    folder=$(cd "$folder" && pwd)
    tar -C "$(dirname "$folder")" -cJf "$folder.tar.xz" "$(basename "$folder")" || exit 1
    du -sh "$folder" "$folder.tar.xz"
}

# ---- Running --------------------------------------------------------------------------------------------------------
# The folders of the nvidia/* packages of the python3 on the PATH, if there is one.
python_libraries() {
    python3 - 2> /dev/null << 'PYTHON'
import glob, os, site, sysconfig
roots = {sysconfig.get_paths()["purelib"], site.getusersitepackages(), *site.getsitepackages()}
print(":".join(sorted(p for r in roots for p in glob.glob(os.path.join(r, "nvidia", "*", "lib")))))
PYTHON
}

part() {
    local kind=$1 seconds=$2 name=$3 left status began=$SECONDS
    shift 3
    left=$((LIMIT - SECONDS))
    if [ "$left" -lt 5 ]; then
        report skipped "$kind" "$name" "no time was left"
        return
    fi
    [ "$seconds" -lt "$left" ] || seconds=$left
    run_limited "$seconds" "$@" > "$OUT/$name.log" 2>&1
    status=$?
    case $status in
        0) report ok "$kind" "$name" "$((SECONDS - began)) s" ;;
        77) report skipped "$kind" "$name" "$(tail -n 1 "$OUT/$name.log")" ;;
        124) FAILED=1; report FAILED "$kind" "$name" "not done after $seconds s" ;;
        *) FAILED=1; report FAILED "$kind" "$name" "exit status $status: $(grep -v '^ *$' "$OUT/$name.log" | tail -n 1)" ;;
    esac
    # A measurement is its last lines.
    [ "$kind $status" = "fast 0" ] && sed 's/^/    /' "$OUT/$name.log" | tee -a "$OUT/summary.txt"
}

# run_limited SECONDS COMMAND...: as `timeout`, but for functions, too. What is left over is ended.
run_limited() {
    local seconds=$1 job waker status
    shift
    set -m
    "$@" &
    job=$!
    (sleep "$seconds" && kill -TERM -- -"$job" && sleep 5 && kill -KILL -- -"$job") 2> /dev/null &
    waker=$!
    wait "$job"
    status=$?
    if kill -- -"$waker" 2> /dev/null; then :; else status=124; fi
    wait "$waker" 2> /dev/null
    set +m
    # By a signal of the above.
    [ "$status" = 143 ] || [ "$status" = 137 ] && status=124
    return "$status"
}

report() {
    printf '%-8s %-6s %-30s %s\n' "$@" | tee -a "$OUT/summary.txt"
}

run() {
    local folder=$1 extra
    OUT=${2:-gpu-results} LIMIT=${GPU_SECONDS:-570} FAILED=0 SECONDS=0
    mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
    cd "$folder" || exit 1
    [ -x dblaunch ] && [ -x dblaunch-tests ] && [ -x dblaunch-it ] ||
        { echo "gpu.sh: $folder holds no dblaunch, dblaunch-tests and dblaunch-it" >&2; exit 1; }
    : > "$OUT/summary.txt"
    extra=$(python_libraries)
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}${extra:+:$extra}
    parts
    report "$([ "$FAILED" = 0 ] && echo passed || echo FAILED)" "" "after $SECONDS s" "logs in $OUT"
    exit "$FAILED"
}

case ${1:-} in
    build) [ $# = 2 ] && build "$2" || usage ;;
    run) [ $# -ge 2 ] && run "$2" "${3:-}" || usage ;;
    *) usage ;;
esac
