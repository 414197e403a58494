"""Compares `benches/ops.rs` with PyTorch: both measure each case in turn, several times, and the ratio of rates is printed.

    cargo bench --bench ops --no-run        # names the program
    python benches/ops_torch.py PROGRAM [--rounds 5] [--only TEXT] [--json FILE] [--cpu-time]
"""

import argparse
import json
import os
import statistics
import subprocess
import time

THREADS = os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MKL_NUM_THREADS", THREADS)
os.environ.setdefault("MKL_DYNAMIC", "FALSE")
# candle's own threads only wait in a circle here.
os.environ.setdefault("CANDLE_NUM_THREADS", "1")

import torch  # noqa: E402  (reads the environment when imported)
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(int(THREADS))
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def prepare(case):
    """The case as a function, and its number of floating-point operations."""
    dtype, pass_, kind, *sizes = case.split()
    sizes = [int(s) for s in sizes]
    new = lambda *shape: torch.rand(*shape).mul_(2).sub_(1).to(DTYPES[dtype])
    if kind == "linear":
        rows, inputs, outputs = sizes
        x, w, b, dy = new(rows, inputs), new(outputs, inputs), new(outputs), new(rows, outputs)
        operations = 2 * rows * inputs * outputs
        if pass_ == "forward":
            return lambda: F.linear(x, w, b), operations
        if pass_ == "data":
            return lambda: dy @ w, operations
        return lambda: (dy @ w, dy.t() @ x, dy.sum(0)), 2 * operations
    images, inputs, outputs, height, width, kernel, stride, padding = sizes
    x, w, b = new(images, inputs, height, width), new(outputs, inputs, kernel, kernel), new(outputs)
    y = F.conv2d(x, w, b, stride, padding)
    dy = new(*y.shape)
    operations = 2 * y.numel() * inputs * kernel * kernel
    if pass_ == "forward":
        return lambda: F.conv2d(x, w, b, stride, padding), operations
    mask = [True, pass_ == "backward", pass_ == "backward"]
    two = lambda n: [n, n]
    backward = lambda: torch.ops.aten.convolution_backward(
        dy, x, w, [outputs], two(stride), two(padding), two(1), False, two(0), 1, mask
    )
    return backward, operations * (2 if pass_ == "backward" else 1)


def best(run, clock):
    """As in ops.rs."""
    run()

    def measure(count):
        start = clock()
        for _ in range(count):
            run()
        return clock() - start

    count = 1
    while measure(count) < 0.02:
        count *= 2
    times = []
    while len(times) < 3 or sum(times) < 0.3:
        times.append(measure(count))
    return min(times) / count


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("program")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--only", default="")
    arguments.add_argument("--json")
    arguments.add_argument("--cpu-time", action="store_true", help="one thread, by its time on a core")
    arguments = arguments.parse_args()
    command = [arguments.program, "--serve", "--threads", THREADS]
    clock = time.perf_counter
    if arguments.cpu_time:
        command.append("--cpu-time")
        torch.set_num_threads(1)
        clock = time.thread_time
    ours = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(line):
        print(line, file=ours.stdin, flush=True)
        return ours.stdout.readline().strip()

    cases, line = [], ask("list")
    while line:
        cases.append(line)
        line = ours.stdout.readline().strip()
    report = []
    print(f"{'case':46} {'ours':>9} {'torch':>9} GFLOP/s   ratio (lowest to highest)")
    with torch.no_grad():
        for case in cases:
            if arguments.only not in case:
                continue
            run, operations = prepare(case)
            pairs = [(int(ask(case)) / 1e9, best(run, clock)) for _ in range(arguments.rounds)]
            ratios = [theirs / mine for mine, theirs in pairs]
            mine, theirs = (operations / min(times) / 1e9 for times in zip(*pairs))
            ratio = statistics.median(ratios)
            print(f"{case:46} {mine:9.1f} {theirs:9.1f}           {ratio:5.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
            report.append({"case": case, "gflops": mine, "torch_gflops": theirs, "ratio": ratio, "ratios": ratios})
    ours.stdin.close()
    ours.wait()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"threads": int(THREADS), "torch": torch.__version__, "cases": report}, file, indent=1)


if __name__ == "__main__":
    main()
