#!/usr/bin/env python3
"""On a GPU: attention and the training step of SD 1.5's UNet in PyTorch beside `dblaunch bench`, in turn, in bf16.

usage: gpu_torch.py DBLAUNCH [--rounds 3] [--batches 1,4,16] [--no-compile] [--seconds 500]
Attention: scaled_dot_product_attention with its flash kernels. The step: diffusers' UNet2DConditionModel of SD 1.5's shape
with random weights, 64x64 latents, autocast to bf16, channels-last, fused AdamW, gradients' norm clipped; eager and
compiled. Needs torch; without diffusers the step is left out, which is said. Last lines: what was aimed at, and whether it
held. No part of the test command."""
import argparse, json, statistics, subprocess, time
import torch

p = argparse.ArgumentParser()
p.add_argument("dblaunch"); p.add_argument("--rounds", type=int, default=3); p.add_argument("--batches", default="1,4,16")
p.add_argument("--no-compile", action="store_true"); p.add_argument("--seconds", type=float, default=500)
a = p.parse_args()
began = time.monotonic()
print(json.dumps({"torch": torch.__version__, "gpu": torch.cuda.get_device_name()}))

ratios = {}

def compared(kind, what, ratio):
    ratios.setdefault(kind, []).append((ratio, what))

def aim(kind, least):
    """What is the smallest of a kind's ratios, and is it large enough?"""
    ratio, what = min(ratios.get(kind, [(None, "nothing was compared")]))
    print(json.dumps({"aim": f"{kind}, at least {least}", "least": ratio, "at": what, "held": ratio and ratio >= least}))

def ours(*arguments):
    out = subprocess.run([a.dblaunch, "bench", *arguments], stdout=subprocess.PIPE, check=True, text=True).stdout
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]

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

def attention():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    for line in (line for line in ours("kernels", "--limit", str(8 << 30)) if line.get("kernel") == "attention"):
        batch, heads, queries, keys, width = line["shape"]
        make = lambda tokens: torch.randn(batch, tokens, heads, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        q, k, v, dy = make(queries).requires_grad_(), make(keys).requires_grad_(), make(keys).requires_grad_(), make(queries)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            forward = timed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), 5)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            backward = timed(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True), 5)
        mine = line["microseconds"]
        both = (forward + backward) * 1e6 / (mine["forward"] + mine["backward"])
        print(json.dumps({"attention": line["shape"], "dblaunch_us": mine, "torch_us": {"forward": forward * 1e6,
            "backward": backward * 1e6}, "torch/dblaunch": both}), flush=True)
        compared("attention, torch/dblaunch", line["shape"], both)

def torch_step(unet, batch, steps):
    """Seconds of each step after the first ones."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
    x = torch.randn(batch, 4, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    context, at = torch.randn(batch, 77, 768, device="cuda"), torch.full((batch,), 500, device="cuda")
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize(); t = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = unet(x, at, context).sample
        y.float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step(); optimizer.zero_grad()
        torch.cuda.synchronize(); seconds.append(time.perf_counter() - t)
    return seconds[3:]

def step():
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        print("without diffusers the UNet's step is not compared")
        return
    def unet():
        torch.manual_seed(0)
        made = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        return made.to("cuda", memory_format=torch.channels_last).train()
    ways = ["eager"] if a.no_compile else ["eager", "compiled"]
    for batch in map(int, a.batches.split(",")):
        steps, line = max(6, 24 // batch), {"unet": batch}
        mine = []
        for _ in range(a.rounds):
            rows = ours("memory", "--device", "cuda", "--dtype", "bf16", "--latent", "64", "--batch", str(batch), "--keep", "graph",
                "--steps", str(steps))[-1]["rows"]
            mine += rows[0]["seconds"][3:]
        line["dblaunch"] = batch / statistics.median(mine)
        line["dblaunch_GiB"] = rows[0]["device"] / 2**30
        for way in ways:
            if time.monotonic() - began > a.seconds:
                line[way] = "no time was left"
                continue
            model = unet()
            if way == "compiled":
                model = torch.compile(model)
            torch.cuda.reset_peak_memory_stats()
            theirs = torch_step(model, batch, steps)
            line[way] = batch / statistics.median(theirs)
            line[f"{way}_GiB"] = torch.cuda.max_memory_allocated() / 2**30
            line[f"dblaunch/{way}"] = line["dblaunch"] / line[way]
            compared(f"UNet, dblaunch/{way}", f"batch {batch}", line[f"dblaunch/{way}"])
            del model
            torch.cuda.empty_cache()
        print(json.dumps(line), "images/s", flush=True)

attention()
step()
aim("attention, torch/dblaunch", 0.6)
aim("UNet, dblaunch/eager", 1.0)
aim("UNet, dblaunch/compiled", 1.0)
