#!/usr/bin/env bash
# Everything that needs a GPU, correctness first, then measurements. The machine needs an NVIDIA GPU with its driver, bash,
# and the CUDA libraries (below); no network, no Rust, no compiler.
#
#   tests/gpu.sh build FOLDER        where Rust is: builds what is run and puts it into FOLDER, this file too, and packed
#                                    into FOLDER.tar.xz. With the environment of `tools/cuda-toolchain.sh` it serves all
#                                    machines; DBLAUNCH_CUDA_ARCHS=90 (say) makes it for one kind of GPU, smaller and sooner.
#   tests/gpu.sh run FOLDER [OUT]    where the GPU is: runs it. `summary.txt`, `logs.tar.gz` (whole after every part) and
#                                    `profile.json` go to OUT (gpu-results unless given). Exit status 1 if a part failed.
#
# Without xz the packed folder is unpacked by `python3 -m tarfile -e FOLDER.tar.xz`. cuBLAS and cuRAND (and NCCL for several
# ranks) are found through LD_LIBRARY_PATH, the system's loader, or the nvidia/* packages of the `python3` on the PATH.
#
# The whole takes GPU_SECONDS (570 unless set) at most: parts for which no time is left are skipped, and the summary says so.
# GPU_PARTS, a regular expression, chooses parts by "KIND NAME": '^right' what must be correct, '^fast' the measurements,
# which is two calls where ten minutes are not enough; 'sd15|pytorch' some by their names. A measurement that misses what is
# aimed at is `missed`, which is no failure; one that misses what is required has FAILED.
set -uo pipefail

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 2
}

# The parts: what is run.
. "$(dirname "$0")/gpu_parts.sh" || exit 1

build() {
    local folder=$1 tests unit it target
    cd "$(dirname "$0")/.." || exit 1
    mkdir -p "$folder" || exit 1
    folder=$(cd "$folder" && pwd) target=${CARGO_TARGET_DIR:-target}
    cargo build --locked --release --features cuda || exit 1
    tests=$(cargo test --locked --release --features cuda --lib --test it --no-run 2>&1 | tee >(cat >&2))
    unit=$(sed -n 's/.*Executable unittests .*(\(.*\))$/\1/p' <<< "$tests")
    it=$(sed -n 's/.*Executable tests.it.main.rs (\(.*\))$/\1/p' <<< "$tests")
    [ -x "$unit" ] && [ -x "$it" ] || { echo "gpu.sh: cargo did not say where the tests are" >&2; exit 1; }
    cp "$target/release/dblaunch" "$folder/dblaunch" && cp "$unit" "$folder/dblaunch-tests" && cp "$it" "$folder/dblaunch-it" || exit 1
    strip "$folder"/dblaunch* 2> /dev/null
    # What the parts read: a small model of each kind, photographs, recorded runs; and what they run.
    mkdir -p "$folder/tests/data/images" && cp -r tests/stand_in "$folder/tests/" && cp -r tests/data/{models,parity} "$folder/tests/data/" &&
        cp -r tests/data/images/{square,rough} "$folder/tests/data/images/" && rm -f "$folder"/tests/data/parity/*/probe.safetensors &&
        cp tests/gpu.sh tests/gpu_parts.sh tests/pictures.py benches/gpu_torch.py benches/half_torch.py "$folder/" || exit 1
    # What the comparison with PyTorch takes besides what is where PyTorch is (transformers, huggingface-hub, numpy, ...):
    # Python alone, so that another Python than this one runs it.
    python3 -m pip install --quiet --no-deps --no-compile --only-binary=:all: --python-version 3.12 --upgrade --target "$folder/python" \
        diffusers==0.42.1 importlib_metadata==8.7.0 zipp==3.23.0 ||
        echo "gpu.sh: diffusers could not be fetched: without it only attention is compared with PyTorch" >&2
    # A dictionary that spans the three programs, which have the kernels in common.
    tar -C "$(dirname "$folder")" --sort=name -cf - "$(basename "$folder")" | xz --lzma2=preset=9e,dict=192MiB > "$folder.tar.xz" || exit 1
    du -sh "$folder" "$folder.tar.xz"
}

# The folders of the nvidia/* packages of the python3 on the PATH, if there is one.
python_libraries() {
    python3 - 2> /dev/null << 'PYTHON'
import glob, os, site, sysconfig
roots = {sysconfig.get_paths()["purelib"], site.getusersitepackages(), *site.getsitepackages()}
print(":".join(sorted(p for r in roots for p in glob.glob(os.path.join(r, "nvidia", "*", "lib")))))
PYTHON
}

part() {
    local kind=$1 seconds=$2 name=$3 left log status began=$SECONDS verdict=ok
    shift 3
    [[ "$kind $name" =~ $ONLY ]] || return 0
    left=$((LIMIT - SECONDS)) log="$LOGS/$name.log"
    if [ "$left" -lt 5 ]; then
        report skipped "$kind" "$name" "no time was left"
        return
    fi
    [ "$seconds" -lt "$left" ] || seconds=$left
    UNDER_WAY=$name
    # shellcheck disable=SC2034
    PART_SECONDS=$seconds
    run_limited "$seconds" "$@" > "$log" 2>&1
    status=$?
    case $status in
        0)
            if misses "$log"; then verdict=missed MISSED=$((MISSED + 1)); fi
            report $verdict "$kind" "$name" "$((SECONDS - began)) s$(passed_tests "$log")"
            ;;
        77) report skipped "$kind" "$name" "$(tail -n 1 "$log")" ;;
        124) FAILED=1; report FAILED "$kind" "$name" "not done after $seconds s$(passed_tests "$log")" ;;
        *) FAILED=1; report FAILED "$kind" "$name" "exit status $status: $(grep -v '^ *$' "$log" | tail -n 1 | cut -c 1-300)" ;;
    esac
    [ "$kind" = right ] || [ "$status" = 77 ] || show "$log"
    UNDER_WAY=''
    pack
}

# Also of a list of tests that was not done.
passed_tests() {
    local count
    count=$(grep -c '^test .* ok$' "$1") && echo "; $count tests passed"
}

# A measurement is its last lines, also one that was not done.
show() {
    tail -n 150 "$1" | cut -c 1-2000 | sed 's/^/    /' >> "$OUT/summary.txt"
    grep '"aim"\|"held"' "$1" | cut -c 1-400 | sed 's/^/    /' >&3
}

# So that whoever kills this loses nothing.
pack() {
    tar -C "$SCRATCH" -czf "$SCRATCH/logs.tar.gz" logs && cp "$SCRATCH/logs.tar.gz" "$OUT/.logs" && mv "$OUT/.logs" "$OUT/logs.tar.gz"
}

# run_limited SECONDS COMMAND...: as `timeout`, but for functions, too. What is left over is ended.
run_limited() {
    local seconds=$1 waker status
    shift
    rm -f "$SCRATCH/late"
    set -m
    "$@" 3>&- &
    JOB=$!
    (sleep "$seconds" && : > "$SCRATCH/late" && kill -TERM -- -"$JOB" && sleep 5 && kill -KILL -- -"$JOB") > /dev/null 2>&1 3>&- &
    waker=$!
    # Ends with the command or, if that is a function, with the shell that runs it: its processes may take longer.
    wait "$JOB"
    status=$?
    kill -KILL -- -"$waker" 2> /dev/null
    wait "$waker" 2> /dev/null
    end_job
    set +m
    [ ! -e "$SCRATCH/late" ] || status=124
    return "$status"
}

# Processes of the part have a moment to say what they know.
end_job() {
    local tenths
    kill -TERM -- -"$JOB" 2> /dev/null
    for ((tenths = 0; tenths < 50; tenths++)); do
        kill -0 -- -"$JOB" 2> /dev/null || break
        sleep 0.1
    done
    kill -KILL -- -"$JOB" 2> /dev/null
    JOB=''
}

report() {
    printf '%-8s %-6s %-34s %s\n' "$@" | tee -a "$OUT/summary.txt" >&3
}

stopped() {
    trap '' TERM INT HUP
    [ -z "$JOB" ] || end_job
    report FAILED "" "after $SECONDS s" "stopped from outside${UNDER_WAY:+, in $UNDER_WAY}"
    [ -z "$UNDER_WAY" ] || show "$LOGS/$UNDER_WAY.log"
    pack
    exit 1
}

run() {
    local folder=$1 extra
    OUT=${2:-gpu-results} LIMIT=${GPU_SECONDS:-570} ONLY=${GPU_PARTS:-} FAILED=0 MISSED=0 SECONDS=0 JOB='' UNDER_WAY=''
    # What is reported goes there from wherever it is reported.
    exec 3>&1
    mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
    cd "$folder" || exit 1
    [ -x dblaunch ] && [ -x dblaunch-tests ] && [ -x dblaunch-it ] ||
        { echo "gpu.sh: $folder holds no dblaunch, dblaunch-tests and dblaunch-it" >&2; exit 1; }
    SCRATCH=$(mktemp -d) || exit 1
    trap 'rm -rf "$SCRATCH"' EXIT
    trap stopped TERM INT HUP
    LOGS="$SCRATCH/logs"
    mkdir "$LOGS"
    : > "$OUT/summary.txt"
    extra=$(python_libraries)
    # No empty part: that would be the current folder.
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH${extra:+:}}$extra
    [ -d python ] && export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD/python
    # What the driver and PyTorch compile is kept for the parts that follow.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} CUDA_CACHE_PATH="$SCRATCH/cuda" TORCHINDUCTOR_CACHE_DIR="$SCRATCH/inductor" TRITON_CACHE_DIR="$SCRATCH/triton"
    parts
    report "$([ "$FAILED" = 0 ] && echo passed || echo FAILED)" "" "after $SECONDS s" "$MISSED missed what was aimed at; logs in $OUT/logs.tar.gz"
    exit "$FAILED"
}

case ${1:-} in
    build) [ $# = 2 ] && build "$2" || usage ;;
    run) [ $# -ge 2 ] && run "$2" "${3:-}" || usage ;;
    *) usage ;;
esac
