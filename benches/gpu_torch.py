#!/usr/bin/env python3
"""On a GPU: attention and the training step of SD 1.5's UNet in PyTorch beside `dblaunch bench`, in bf16.

usage: gpu_torch.py DBLAUNCH [--kernels FILE] [--rounds 1] [--batches 1,4,16] [--no-compile] [--seconds 500]
Attention: scaled_dot_product_attention with its flash kernels, beside what `dblaunch bench kernels` printed into FILE or,
where there is none, prints now. The step: diffusers' UNet2DConditionModel of SD 1.5's shape with random weights, 64x64 latents, autocast to bf16,
channels-last, fused AdamW, gradients' norm clipped; first ours and eager at every batch, then compiled, as far as the
seconds go. A line as soon as something is measured. Last lines, whatever happens: what was aimed at, and whether it held.
Needs torch; without diffusers the step is left out, which is said. No part of the test command."""
import argparse, gc, json, os, signal, statistics, subprocess, time, traceback
began = time.monotonic()

p = argparse.ArgumentParser()
p.add_argument("dblaunch"); p.add_argument("--kernels"); p.add_argument("--rounds", type=int, default=1)
p.add_argument("--batches", default="1,4,16"); p.add_argument("--no-compile", action="store_true")
p.add_argument("--seconds", type=float, default=500)
a = p.parse_args()
batches = [int(batch) for batch in a.batches.split(",")]
# What to compile for one batch takes at least, once forward and backward have been compiled for another.
COMPILING = 20

class TimeIsUp(BaseException):
    """By the clock or by whoever stops this. No Exception, which are caught where the next measurement may still go well."""

def stop(number, frame):
    # Once: the aims are printed undisturbed.
    signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise TimeIsUp(signal.Signals(number).name)

ratios, speeds = {}, {}

def say(line):
    print(json.dumps(line), flush=True)

def left():
    return a.seconds - (time.monotonic() - began)

def compared(kind, what, ratio):
    ratios.setdefault(kind, []).append((ratio, what))

def aim(kind, least, expected):
    """What is the smallest of a kind's ratios, and is it large enough? Not if some were not measured."""
    found = ratios.get(kind, [])
    ratio, what = min(found, default=(None, "nothing was compared"))
    held = ratio >= least and (None if len(found) < expected else True) if found else None
    say({"aim": f"{kind}, at least {least}", "least": ratio, "at": what, "compared": f"{len(found)} of {expected}", "held": held})

def attempt(what, work):
    """Whether it went well. One that fails does not keep the others from being measured."""
    try:
        work()
        return True
    except Exception as error:
        traceback.print_exc()
        say({"failed": what, "why": f"{type(error).__name__}: {error}"[:500]})
        return False

def json_lines(text):
    """But for one that whoever stopped the program has cut."""
    found = []
    for line in text.splitlines():
        try:
            found += [json.loads(line)] if line.startswith("{") else []
        except ValueError:
            pass
    return found

def ours(*arguments):
    done = subprocess.run([a.dblaunch, "bench", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"dblaunch bench {arguments[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-400:]}")
    return json_lines(done.stdout)

def timed(work, repeats):
    """Seconds of one call, the best of some."""
    work(); best = float("inf")
    for _ in range(5):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            work()
        last.record(); last.synchronize()
        best = min(best, first.elapsed_time(last) / 1e3 / repeats)
    return best

def attention_lines():
    measured = []
    if a.kernels and os.path.exists(a.kernels):
        with open(a.kernels) as file:
            measured = json_lines(file.read())
    lines = [line for line in measured if line.get("kernel") == "attention"]
    return lines or [line for line in ours("kernels", "--limit", str(8 << 30)) if line.get("kernel") == "attention"]

def attention(line):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    batch, heads, queries, keys, width = line["shape"]
    make = lambda tokens: torch.randn(batch, tokens, heads, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    q, k, v, dy = make(queries).requires_grad_(), make(keys).requires_grad_(), make(keys).requires_grad_(), make(queries)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        forward = timed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), 5)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        backward = timed(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True), 5)
    mine = line["microseconds"]
    both = (forward + backward) * 1e6 / (mine["forward"] + mine["backward"])
    say({"attention": line["shape"], "dblaunch_us": mine, "torch_us": {"forward": forward * 1e6, "backward": backward * 1e6},
        "torch/dblaunch": both})
    compared("attention, torch/dblaunch", line["shape"], both)

def steps_of(batch):
    return max(8, 24 // batch)

def our_step(batch):
    """Every step's seconds but the first ones', and the GPU's memory."""
    seconds = []
    for _ in range(a.rounds):
        row = ours("memory", "--device", "cuda", "--dtype", "bf16", "--latent", "64", "--batch", str(batch), "--keep", "graph",
            "--steps", str(steps_of(batch)))[-1]["rows"][0]
        seconds += row["seconds"][3:]
    return seconds, row["device"]

def torch_step(model, batch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
    x = torch.randn(batch, 4, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    context, at = torch.randn(batch, 77, 768, device="cuda"), torch.full((batch,), 500, device="cuda")
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(a.rounds * steps_of(batch)):
        torch.cuda.synchronize(); t = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = model(x, at, context).sample
        y.float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(); optimizer.zero_grad()
        torch.cuda.synchronize(); seconds.append(time.perf_counter() - t)
    return seconds[3:], torch.cuda.max_memory_allocated()

def measured(way, batch, work):
    since = time.monotonic()
    seconds, memory = work(batch)
    speed = speeds[way, batch] = batch / statistics.median(seconds)
    line = {"unet": batch, "way": way, "images/s": speed, "ms": statistics.median(seconds) * 1e3, "GiB": memory / 2**30}
    if way != "dblaunch" and ("dblaunch", batch) in speeds:
        line[f"dblaunch/{way}"] = speeds["dblaunch", batch] / speed
        compared(f"UNet, dblaunch/{way}", f"batch {batch}", line[f"dblaunch/{way}"])
    say({**line, "took": round(time.monotonic() - since, 1)})

def freed():
    """Also what a measurement that failed left behind."""
    gc.collect(); torch.cuda.empty_cache()

def compiled(batch):
    # For this batch alone, as if it were the only one.
    torch._dynamo.reset()
    return torch_step(torch.compile(unet, dynamic=False), batch)

def make_unet():
    global unet
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    with torch.device("cuda"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet = unet.to(memory_format=torch.channels_last).train()

def of_torch(way, work):
    for batch in batches if unet is not None else []:
        if way == "compiled" and left() < COMPILING:
            say({"unet": batch, "way": way, "images/s": None, "why": "no time was left"})
            continue
        attempt(f"{way} at batch {batch}", lambda: measured(way, batch, work)); freed()

shapes, unet = [], None
try:
    signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, a.seconds))
    import torch
    say({"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "seconds": round(time.monotonic() - began, 1)})
    for batch in batches:
        attempt(f"dblaunch at batch {batch}", lambda: measured("dblaunch", batch, our_step))
    attempt("making diffusers' UNet, without which its step is not compared", make_unet)
    of_torch("eager", lambda batch: torch_step(unet, batch))
    attempt("attention of dblaunch", lambda: shapes.extend(attention_lines()))
    for line in shapes:
        attempt(f"attention {line['shape']}", lambda: attention(line))
    freed()
    if not a.no_compile:
        of_torch("compiled", compiled)
except TimeIsUp as cause:
    say({"stopped": str(cause), "seconds": round(time.monotonic() - began, 1)})
finally:
    aim("attention, torch/dblaunch", 0.6, max(1, len(shapes)))
    aim("UNet, dblaunch/eager", 1.0, len(batches))
    aim("UNet, dblaunch/compiled", 1.0, len(batches))
