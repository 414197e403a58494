#!/usr/bin/env python3
"""Times `dblaunch bench adamw` beside torch.optim.AdamW(fused=True) and, where DeepSpeed is installed, its DeepSpeedCPUAdam,
which is compiled on the spot (needs g++ and ninja): fp32 on two threads, in turn, medians of all rounds. Theirs lies in huge
pages too, as ours always does: without them they are slower.

usage: adamw_torch.py DBLAUNCH [--elements 50000000] [--rounds 7] [--threads 2]
Needs torch; `pip install deepspeed ninja` for the other. No part of the test command."""
import argparse, json, os, statistics, subprocess, time

p = argparse.ArgumentParser()
p.add_argument("dblaunch")
p.add_argument("--elements", type=int, default=50_000_000)
p.add_argument("--rounds", type=int, default=7)
p.add_argument("--threads", type=int, default=2)
a = p.parse_args()
os.environ.update(OMP_NUM_THREADS=str(a.threads), MKL_NUM_THREADS=str(a.threads), MKL_DYNAMIC="FALSE", DS_ACCELERATOR="cpu",
    THP_MEM_ALLOC_ENABLE="1")
import torch

torch.set_num_threads(a.threads)
SETTINGS = dict(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
REPEATS = 3
BYTES = 28


def weights():
    parameter = torch.nn.Parameter(torch.rand(a.elements) * 0.04 - 0.02)
    parameter.grad = torch.rand(a.elements) * 0.02 - 0.01
    return [parameter]


optimizers = {"torch fused": torch.optim.AdamW(weights(), fused=True, **SETTINGS)}
try:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizers["deepspeed"] = DeepSpeedCPUAdam(weights(), adamw_mode=True, **SETTINGS)
except ImportError as error:
    print(f"without DeepSpeed: {error}")


def theirs(optimizer):
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return times


def ours():
    """Medians by name: another process, with threads of its own; those here sleep meanwhile."""
    command = [a.dblaunch, "bench", "adamw", "--elements", str(a.elements), "--repeats", str(REPEATS)]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    result = json.loads(out.strip().splitlines()[-1])
    assert result["threads"] == a.threads, f"dblaunch used {result['threads']} threads; see taskset"
    return {row["name"]: row["seconds"] for row in result["rows"]}


for optimizer in optimizers.values():
    optimizer.step()
times = {}
for _ in range(a.rounds):
    for name, optimizer in optimizers.items():
        times.setdefault(name, []).extend(theirs(optimizer))
    for name, seconds in ours().items():
        times.setdefault(f"dblaunch, {name}", []).append(seconds)
reference = statistics.median(times["dblaunch, fp32"])
print(f"{'':30}      ms  GB/s at 28 bytes  time / dblaunch's fp32  fastest, ms")
for name, seconds in times.items():
    middle = statistics.median(seconds)
    speed = BYTES * a.elements / middle / 1e9
    print(f"{name:30} {middle * 1e3:7.2f}  {speed:16.2f}  {middle / reference:22.3f}  {min(seconds) * 1e3:11.2f}")
