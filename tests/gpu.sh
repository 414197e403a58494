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
# time is left are skipped, and the summary says so. GPU_PARTS, a regular expression, chooses parts by their names.
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
    part right 120 recorded-runs-of-the-peer env DBLAUNCH_TEST_GPU=1 DBLAUNCH_TEST_HOME=. ./dblaunch-it --test-threads 1 parity::
    part right 90 runs-as-on-the-cpu as_on_the_cpu
    part right 90 half-precision-beside-pytorch half_precision
    part right 20 no-gpu-is-told told 2 "shows no GPU" env CUDA_VISIBLE_DEVICES= ./dblaunch bench gpu
    part right 20 a-run-without-one-is-told told 2 "shows no GPU" env CUDA_VISIBLE_DEVICES= ./dblaunch check --set model.device=cuda configs/demo.toml
    part right 30 one-gpu-for-two-is-told told 2 "were given the same GPU" env CUDA_VISIBLE_DEVICES=0 ./dblaunch bench gpu --nproc 2
    part right 90 two-ranks-over-nccl env DBLAUNCH_SHARE_GPU=1 ./dblaunch bench gpu --nproc 2
    part right 60 a-failing-rank-ends-the-others told 1 "failed on purpose" env DBLAUNCH_SHARE_GPU=1 ./dblaunch bench gpu --nproc 2 --fail
    part right 60 a-card-too-small-is-told capped 1500000000 told 2 "MiB left" ./dblaunch --set model.device=cuda --set memory.vram=4GiB \
        --set data.resolution=1024 --set train.batch_size=64 --set output.dir="$OUT/too-small" tests/stand_in/train.toml
    part fast 90 sd15-under-6-GB capped 6000000000 sd15 --vram 5100000000 --ram 16000000000 --parameters host --optimizer host --keep graph
    part fast 90 sd15-under-4-GB capped 4000000000 sd15 --vram 3100000000 --parameters host --gradients host --optimizer host
    part fast 90 sd15-with-text-under-8-GB capped 8000000000 sd15 --vram 7100000000 --text-encoder --parameters host --optimizer host
    part fast 90 sd15-offloaded-beside-its-bounds ./dblaunch bench offload --profile "$OUT"
    part fast 60 gpu ./dblaunch bench gpu
    part fast 90 kernels ./dblaunch bench kernels --limit 8589934592
    part fast 90 all-gpus on_all_gpus
    part fast 300 beside-pytorch beside_pytorch
}

# sd15 OPTIONS...: a few steps of SD 1.5's UNet on 512 pixels.
sd15() {
    ./dblaunch bench memory --device cuda --dtype bf16 --latent 64 --steps 4 "$@"
}

# capped BYTES COMMAND...: while another process holds all of the GPU's memory but so many bytes.
capped() {
    local bytes=$1 left status
    shift
    coproc HOLDER { exec ./dblaunch bench hold --leave "$bytes"; }
    # Its descriptors are gone as soon as it has ended.
    local from=${HOLDER[0]} to=${HOLDER[1]} holder=$HOLDER_PID
    read -r left <&"$from" || { echo "the memory could not be held"; return 1; }
    echo "held: $left"
    "$@"
    status=$?
    nvidia-smi --query-gpu=memory.used,memory.free --format=csv
    kill "$holder"
    wait "$holder" 2> /dev/null
    return "$status"
}

# Losses and norms of a run, one a line.
metrics() {
    rm -rf "$OUT/run"
    "$@" --set output.dir="$OUT/run" > /dev/null || return 1
    grep grad_norm "$OUT/run/metrics.jsonl" | grep -o '"\(loss\|grad_norm\)":[0-9.e-]*' | cut -d : -f 2
}

# A small network with its text encoder on the GPU, by one rank and by two over NCCL, wherever its states rest.
as_on_the_cpu() {
    local train="./dblaunch tests/stand_in/train.toml --set model.train_text_encoder=true" sets
    metrics $train --set model.device=cpu > "$OUT/on-the-cpu" || return 1
    for sets in "" "--set train.recompute=true --set zero.offload_params=host --set zero.offload_gradients=host \
        --set zero.offload_optimizer=host" "--nproc 2 --set train.batch_size=1 --set zero.stage=3 --set zero.collectives=nccl" \
        "--nproc 2 --set train.batch_size=1 --set zero.stage=2 --set zero.collectives=host"; do
        DBLAUNCH_SHARE_GPU=1 metrics $train --set model.device=cuda $sets > "$OUT/on-the-gpu" || return 1
        paste "$OUT/on-the-cpu" "$OUT/on-the-gpu" | awk '
            { print; off = ($1 - $2) / $1; if (off < 0) off = -off; if (off > 1e-5 || $2 == "") bad = 1 }
            END { exit bad || NR != 6 }' || { echo "not the CPU's: $sets"; return 1; }
    done
}

beside_pytorch() {
    python3 -c 'import torch' || { echo "there is no PyTorch"; return 77; }
    python3 gpu_torch.py ./dblaunch --seconds 200
}

half_precision() {
    python3 -c 'import torch, safetensors' || { echo "there is no PyTorch with safetensors"; return 77; }
    python3 half_torch.py ./dblaunch
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
    cp -r configs demo "$folder/" && mkdir -p "$folder/tests" && cp -r tests/data tests/stand_in "$folder/tests/" &&
        cp benches/gpu_torch.py benches/half_torch.py "$folder/" || exit 1
    # What the comparison with PyTorch takes besides what is where PyTorch is.
    python3 -m pip install --quiet --no-deps --target "$folder/python" diffusers importlib_metadata ||
        echo "gpu.sh: diffusers could not be fetched: without it only attention is compared with PyTorch" >&2
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
    [[ $name =~ $ONLY ]] || return 0
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
    OUT=${2:-gpu-results} LIMIT=${GPU_SECONDS:-570} ONLY=${GPU_PARTS:-} FAILED=0 SECONDS=0
    mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
    cd "$folder" || exit 1
    [ -x dblaunch ] && [ -x dblaunch-tests ] && [ -x dblaunch-it ] ||
        { echo "gpu.sh: $folder holds no dblaunch, dblaunch-tests and dblaunch-it" >&2; exit 1; }
    : > "$OUT/summary.txt"
    extra=$(python_libraries)
    # No empty part: that would be the current folder.
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH${extra:+:}}$extra
    [ -d python ] && export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD/python
    parts
    report "$([ "$FAILED" = 0 ] && echo passed || echo FAILED)" "" "after $SECONDS s" "logs in $OUT"
    exit "$FAILED"
}

case ${1:-} in
    build) [ $# = 2 ] && build "$2" || usage ;;
    run) [ $# -ge 2 ] && run "$2" "${3:-}" || usage ;;
    *) usage ;;
esac
