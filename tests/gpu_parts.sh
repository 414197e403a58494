# shellcheck shell=bash
# What tests/gpu.sh runs. Read by it, with OUT, SCRATCH, LOGS and PART_SECONDS set.

# part KIND SECONDS NAME COMMAND...   KIND is `right` (correctness) or `fast` (a measurement); SECONDS is the most it may
# take. A command's status says whether it passed; 77 means that this machine cannot run it. Commands run in FOLDER; what they
# write goes to SCRATCH.
parts() {
    part right 15 machine describe_machine
    part right 110 unit-tests env DBLAUNCH_TEST_GPU=1 ./dblaunch-tests --test-threads 4 cuda gpu kernels:: on_device
    part right 60 recorded-runs-of-the-peer env DBLAUNCH_TEST_GPU=1 DBLAUNCH_TEST_HOME=. ./dblaunch-it --test-threads 1 parity::
    part right 60 runs-as-on-the-cpu as_on_the_cpu
    part right 45 pictures-as-on-the-cpu pictures_as_on_the_cpu
    part right 120 ops-beside-fp64-and-pytorch ops_beside_pytorch
    part right 60 sd15-as-on-the-cpu sd15_as_on_the_cpu
    part right 15 no-gpu-is-told told 2 "shows no GPU" env CUDA_VISIBLE_DEVICES= ./dblaunch bench gpu
    part right 15 a-run-without-one-is-told told 2 "shows no GPU" env CUDA_VISIBLE_DEVICES= ./dblaunch check --set model.device=cuda tests/stand_in/train.toml
    part right 20 one-gpu-for-two-is-told told 2 "were given the same GPU" env CUDA_VISIBLE_DEVICES=0 ./dblaunch bench gpu --nproc 2
    part right 45 two-ranks-over-nccl env DBLAUNCH_SHARE_GPU=1 ./dblaunch bench gpu --nproc 2
    part right 30 a-failing-rank-ends-the-others failing_rank
    part right 45 a-killed-rank-ends-the-others killed_rank
    # What is planned for 4 GiB takes 3.2 on any card, more than twice what is left.
    part right 30 a-card-too-small-is-told capped 1500000000 told 2 "MiB left.* set memory\.vram" ./dblaunch --set model.device=cuda \
        --set memory.vram=4GiB --set data.resolution=1344 --set train.batch_size=5 --set train.recompute=false \
        --set output.dir="$SCRATCH/too-small" tests/stand_in/train.toml
    part right 150 training-wherever-states-rest env DBLAUNCH_TEST_GPU=1 ./dblaunch-it --test-threads 4 accelerator::
    part fast 60 sd15-under-6-GB capped 6000000000 sd15 --vram 5100000000 --ram 16000000000 --parameters host --optimizer host --keep graph
    part fast 60 sd15-under-4-GB capped 4000000000 sd15 --vram 3100000000 --ram 16000000000 --parameters host --gradients host --gradients-bf16 \
        --optimizer host
    part fast 60 sd15-with-text-under-8-GB capped 8000000000 sd15 --vram 7100000000 --text-encoder --parameters host --optimizer host
    part fast 90 sd15-offloaded-beside-its-bounds required offloaded
    part fast 45 sd15-launched-by-the-host launched
    part fast 45 gpu ./dblaunch bench gpu
    part fast 60 kernels ./dblaunch bench kernels --limit 8589934592
    part fast 330 beside-pytorch beside_pytorch
    part fast 60 all-gpus on_all_gpus
}

describe_machine() {
    nvidia-smi || return 77
    nvidia-smi topo -m 2> /dev/null
    nproc
    grep MemTotal /proc/meminfo
    df -h . "$SCRATCH"
    # NCCL needs one, if only the loopback.
    ip -brief address 2> /dev/null || cat /proc/net/dev
    python3 -c 'import sys, importlib.metadata as m; print(sys.version, m.version("torch"))'
    ls -l
    echo "LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}"
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
    local from=${HOLDER[0]} holder=$HOLDER_PID
    read -r left <&"$from" || { echo "the memory could not be held"; return 1; }
    echo "held: $left"
    "$@"
    status=$?
    nvidia-smi --query-gpu=memory.used,memory.free --format=csv
    kill "$holder"
    wait "$holder" 2> /dev/null
    return "$status"
}

# required COMMAND...: what is aimed at here is required.
required() {
    "$@" | tee "$SCRATCH/required"
    [ "${PIPESTATUS[0]}" = 0 ] || return 1
    if misses "$SCRATCH/required"; then echo "what is required did not hold"; return 1; fi
}

misses() {
    grep -q '"held": \{0,1\}\(false\|null\)' "$1"
}

# told STATUS WORDS COMMAND...: the command says these words (a regular expression) and ends with this status.
told() {
    local status=$1 words=$2 said
    shift 2
    said=$("$@" 2>&1)
    local ended=$?
    printf '%s\n' "$said"
    [ "$ended" = "$status" ] || { echo "exit status $ended instead of $status"; return 1; }
    grep -Eq -- "$words" <<< "$said" || { echo "it does not say: $words"; return 1; }
}

# metrics COMMAND...: losses and norms of a run, one a line.
metrics() {
    rm -rf "$SCRATCH/run"
    "$@" --set output.dir="$SCRATCH/run" > /dev/null || return 1
    rows
}

rows() {
    grep grad_norm "$SCRATCH/run/metrics.jsonl" | grep -o '"\(loss\|grad_norm\)":[0-9.e-]*' | cut -d : -f 2
}

# near NUMBERS OTHERS COUNT BOUND: so many numbers, one a line, which differ by so much of themselves at most.
near() {
    paste "$1" "$2" | awk -v count="$3" -v bound="$4" '
        { off = $1 == 0 ? $2 : ($1 - $2) / $1; if (off < 0) off = -off; print $1, $2, off }
        !(off <= bound) || NF != 2 { bad = 1 }
        END { exit bad || NR != count }'
}

# A small network with its text encoder on the GPU, by one rank and by two over NCCL, wherever its states rest: the CPU's
# numbers; and with states on the host the very numbers of the GPU.
as_on_the_cpu() {
    local train="./dblaunch tests/stand_in/train.toml --set model.train_text_encoder=true" sets on_gpu="$SCRATCH/on-the-gpu" number=0
    metrics $train --set model.device=cpu > "$SCRATCH/on-the-cpu" || return 1
    for sets in "" "--set train.recompute=true --set zero.offload_params=host --set zero.offload_gradients=host \
        --set zero.offload_optimizer=host" "--nproc 2 --set train.batch_size=1 --set zero.stage=3 --set zero.collectives=nccl" \
        "--nproc 2 --set train.batch_size=1 --set zero.stage=2 --set zero.collectives=host"; do
        DBLAUNCH_SHARE_GPU=1 metrics $train --set model.device=cuda $sets > "$on_gpu.$number" || return 1
        near "$SCRATCH/on-the-cpu" "$on_gpu.$number" 6 1e-5 || { echo "not the CPU's: $sets"; return 1; }
        [ "$number" != 1 ] || cmp "$on_gpu.0" "$on_gpu.1" || { echo "not the bits of the run with all on the GPU: $sets"; return 1; }
        number=$((number + 1))
    done
}

# SD 1.5's UNet in fp32 on latents of 8 x 8: losses and norms of two steps, each a sum of what a hundred ops rounded.
sd15_as_on_the_cpu() {
    local device
    for device in cpu cuda; do
        ./dblaunch bench memory --device "$device" --dtype f32 --latent 8 --steps 2 > "$SCRATCH/sd15-$device.log" || return 1
        grep -o '"\(losses\|norms\)":\[[^]]*\]' "$SCRATCH/sd15-$device.log" | grep -o '[0-9.e-]*[0-9]' > "$SCRATCH/sd15-$device"
    done
    near "$SCRATCH/sd15-cpu" "$SCRATCH/sd15-cuda" 4 1e-4
}

# In fp32 the CPU's pictures to a level. In half precision the two round as often but not the same: the GPU's are as near to
# those in fp32 as the CPU's are, within a factor of two.
pictures_as_on_the_cpu() {
    local device dtype
    python_has zlib || { echo "there is no Python"; return 77; }
    for dtype in fp32 fp16 bf16; do
        for device in cpu cuda; do
            ./dblaunch sample tests/data/models/sd15 --prompt "a photo of sks cat" --num 4 --batch-size 2 --steps 4 --seed 7 \
                --device "$device" --dtype "$dtype" --overwrite --out "$SCRATCH/pictures-$device-$dtype" || return 1
        done
    done
    python3 pictures.py "$SCRATCH"/pictures-{cpu-fp32,cuda-fp32} --most 1 || return 1
    for dtype in fp16 bf16; do
        python3 pictures.py "$SCRATCH"/pictures-{cpu-fp32,cuda-$dtype} --beside "$SCRATCH/pictures-cpu-$dtype" || return 1
    done
}

# python_has MODULE...: without loading them, which takes seconds.
python_has() {
    python3 -c 'import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))' "$@"
}

ops_beside_pytorch() {
    python_has torch safetensors || { echo "there is no PyTorch with safetensors"; return 77; }
    exec python3 half_torch.py ./dblaunch
}

# ended_within SECONDS SINCE: of all ranks, since a time.
ended_within() {
    date +%s.%N | awk -v most="$1" -v since="$2" '
        { printf "all ranks had ended %.2f s later, of %s s\n", $1 - since, most; exit !since || $1 - since > most }'
}

failing_rank() {
    local said
    said=$(told 1 "rank 1 of 2 failed.*failed on purpose" env DBLAUNCH_SHARE_GPU=1 ./dblaunch bench gpu --nproc 2 --fail) ||
        { printf '%s\n' "$said"; return 1; }
    ended_within 5 "$(grep -o '"fails_at":[0-9.]*' <<< "$said" | cut -d : -f 2)" || { printf '%s\n' "$said"; return 1; }
    printf '%s\n' "$said"
}

# process_of RANK LAUNCHER
process_of() {
    local status
    for status in /proc/[0-9]*/status; do
        grep -q "^PPid:[[:space:]]*$2$" "$status" 2> /dev/null && grep -qz "^DBLAUNCH_RANK=$1$" "${status%status}environ" 2> /dev/null &&
            basename "${status%/status}"
    done
}

# One of two ranks is killed in the middle of a run: who is said, the other ends too, and the run goes on from its last
# checkpoint as if nothing had been.
killed_rank() {
    local launcher status killed at other said="$SCRATCH/said" out="$SCRATCH/run"
    local train="./dblaunch --nproc 2 --set model.device=cuda --set train.batch_size=1 --set zero.stage=2 --set train.max_steps=20"
    train="$train --set checkpoint.every=1 tests/stand_in/train.toml"
    export DBLAUNCH_SHARE_GPU=1
    metrics $train > "$SCRATCH/unbroken" || return 1
    rm -rf "$out"
    $train --set output.dir="$out" > "$said" 2>&1 &
    launcher=$!
    until [ "$(grep -c grad_norm "$out/metrics.jsonl" 2> /dev/null)" -ge 4 ] 2> /dev/null; do
        kill -0 "$launcher" 2> /dev/null || { cat "$said"; echo "it ended before it could be broken"; return 1; }
        sleep 0.02
    done
    killed=$(process_of 1 "$launcher") other=$(process_of 0 "$launcher")
    kill -KILL "$killed" || { echo "there is no rank 1"; return 1; }
    at=$(date +%s.%N)
    wait "$launcher"
    status=$?
    ended_within 5 "$at" || status=late
    cat "$said"
    [ "$status" = 1 ] || { echo "status $status instead of 1"; return 1; }
    if kill -0 "$other" 2> /dev/null; then echo "rank 0 is still there"; return 1; fi
    grep -q "rank 1 of 2" "$said" || { echo "it is not said which rank ended"; return 1; }
    $train --set output.dir="$out" --set checkpoint.resume=latest > "$said" 2>&1 || { cat "$said"; return 1; }
    rows | cmp - "$SCRATCH/unbroken" || { echo "it went on differently"; return 1; }
}

offloaded() {
    mkdir -p "$SCRATCH/profile"
    ./dblaunch bench offload --profile "$SCRATCH/profile" || return 1
    # What goes to OUT is small: a longer one is packed.
    [ "$(wc -c < "$SCRATCH/profile/profile.json")" -lt 15000000 ] && cp "$SCRATCH/profile/profile.json" "$OUT/" ||
        gzip -c "$SCRATCH/profile/profile.json" > "$OUT/profile.json.gz"
}

# The same launches with hardly anything to compute, which is the host's own time, and with all that a batch of one has.
launched() {
    local latent
    for latent in 8 64; do
        ./dblaunch bench memory --device cuda --dtype bf16 --latent "$latent" --steps 12 --keep graph > "$SCRATCH/launched" || return 1
        echo "latents of $latent x $latent:"
        grep -v '^{' "$SCRATCH/launched"
    done
}

beside_pytorch() {
    python_has torch || { echo "there is no PyTorch"; return 77; }
    exec python3 gpu_torch.py ./dblaunch --kernels "$LOGS/kernels.log" --seconds $((PART_SECONDS - 15))
}

on_all_gpus() {
    local count
    count=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU')
    [ "${count:-0}" -gt 1 ] || { echo "there is one GPU"; return 77; }
    ./dblaunch bench gpu --nproc "$count"
}
