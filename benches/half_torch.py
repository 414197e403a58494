#!/usr/bin/env python3
"""The error of our ops against fp64: in half precision beside that of PyTorch's own ops with the same inputs, in fp32 alone.

usage: half_torch.py DBLAUNCH [--device cuda|cpu] [--theirs cuda|cpu] [--small]
Each op runs forward and backward in fp32, bf16 and fp16 in both, and in fp64 on the CPU. Errors are root mean square and
maximum over a result's numbers, relative to those of the exact ones; in half precision no error is taken for less than a
quarter (maximum: a half) of what rounding one number costs. Exit status 1 if ours is more than twice PyTorch's anywhere in
half precision, or more than 1e-5 in fp32. Needs torch and safetensors. No part of the test command."""
import argparse, json, math, os, subprocess, sys, tempfile, time
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

p = argparse.ArgumentParser()
p.add_argument("dblaunch"); p.add_argument("--device", default="cuda"); p.add_argument("--theirs")
p.add_argument("--small", action="store_true", help="sizes for an emulated GPU")
a = p.parse_args()
theirs_on = a.theirs or a.device
torch.manual_seed(7)
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
FP32_BOUND = 1e-5

def heads_apart(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)

def attention(o, x, w):
    q, k, v = (heads_apart(t, o["heads"]) for t in x)
    return F.scaled_dot_product_attention(q, k, v, is_causal=o["causal"]).transpose(1, 2).flatten(2)

def group_norm(o, x, w):
    y = F.group_norm(x[0], o["groups"], w[0], w[1], 1e-5)
    return F.silu(y) if o["silu"] else y

def geglu(o, x, w):
    value, gate = x[0].chunk(2, dim=-1)
    return value * F.gelu(gate)

TORCH = {
    "attention": attention, "group_norm": group_norm, "geglu": geglu,
    "conv2d": lambda o, x, w: F.conv2d(x[0], w[0], w[1], stride=o["stride"], padding=o["padding"]),
    "linear": lambda o, x, w: F.linear(x[0], w[0], w[1]),
    "layer_norm": lambda o, x, w: F.layer_norm(x[0], x[0].shape[-1:], w[0], w[1], 1e-5),
    "silu": lambda o, x, w: F.silu(x[0]), "gelu": lambda o, x, w: F.gelu(x[0]),
    "add_channels": lambda o, x, w: x[0] + x[1][:, :, None, None],
    "upsample": lambda o, x, w: F.interpolate(x[0], size=(o["height"], o["width"]), mode="nearest"),
}

def cases():
    """Name, what the op takes beside tensors, shapes of activations and weights: those of SD 1.5, 2.1, SDXL and their text encoders."""
    s = 4 if a.small else 1
    for tokens, keys, width, causal in [(4096, 4096, 40, False), (1024, 1024, 80, False), (256, 256, 160, False), (4096, 77, 40, False),
            (1024, 77, 64, False), (4096, 4096, 64, False), (1024, 1024, 88, False), (256, 77, 88, False), (256, 256, 256, False),
            (77, 77, 64, True), (77, 77, 80, True)]:
        heads, tokens = (2 if a.small else 8), tokens if tokens == 77 else max(64, tokens // s**3)
        keys = keys if keys == 77 else tokens
        inner = heads * width
        name = f"attention {tokens}x{keys} of {width}{' causal' if causal else ''}"
        yield name, {"op": "attention", "heads": heads, "causal": causal}, [[1, tokens, inner], [1, keys, inner], [1, keys, inner]], []
    for side, ins, outs, kernel, stride in [(64, 320, 320, 3, 1), (32, 640, 640, 3, 2), (8, 1280, 1280, 3, 1), (64, 4, 320, 3, 1), (16, 1280, 640, 1, 1)]:
        side, ins, outs = max(8, side // s), max(4, ins // s**2), outs // s**2
        yield f"conv2d {kernel}x{kernel} {ins} to {outs} at {side}, stride {stride}", {"op": "conv2d", "stride": stride, "padding": kernel // 2}, [[2, ins, side, side]], [[outs, ins, kernel, kernel], [outs]]
    for tokens, ins, outs in [(4096, 320, 2560), (77, 768, 320), (1, 320, 1280), (1024, 2560, 640)]:
        tokens, ins, outs = max(1, tokens // s**2), ins // s, outs // s
        yield f"linear {ins} to {outs}", {"op": "linear"}, [[2, tokens, ins]], [[outs, ins], [outs]]
    for channels, side in [(320, 64), (1280, 16), (960, 32)]:
        side = max(8, side // s)
        for silu in [False, True]:
            yield f"group_norm{' silu' if silu else ''} {channels} at {side}", {"op": "group_norm", "groups": 32, "silu": silu}, [[2, channels, side, side]], [[channels], [channels]]
    for tokens, width in [(4096, 320), (256, 1280)]:
        yield f"layer_norm {width}", {"op": "layer_norm"}, [[1, tokens // s**2, width]], [[width], [width]]
    yield "geglu", {"op": "geglu"}, [[1, 1024 // s**2, 5120]], []
    yield "silu", {"op": "silu"}, [[2, 1280]], []
    yield "gelu", {"op": "gelu"}, [[2, 77, 3072]], []
    yield "add_channels", {"op": "add_channels"}, [[2, 320, 32, 32], [2, 320]], []
    yield "upsample", {"op": "upsample", "height": 32, "width": 32}, [[2, 320, 16, 16]], []

def made(spec, xs, ws, dtype):
    """Numbers as a trained network has them, rounded to `dtype`, so that all compute from the same."""
    x = [torch.randn(shape).to(dtype) for shape in xs]
    norm = spec["op"] in ("group_norm", "layer_norm")
    w = []
    for i, shape in enumerate(ws):
        fan_in = torch.Size(shape[1:]).numel()
        w.append(((1 + 0.2 * torch.randn(shape)) if norm and i == 0 else torch.randn(shape) * fan_in**-0.5).to(dtype))
    if norm:
        x = [(t.float() * 1.7 + 0.6).to(dtype) for t in x]
    return x, w

def theirs(spec, x, w, dy, dtype, device):
    x, w = ([t.to(device, dtype).requires_grad_() for t in ts] for ts in (x, w))
    y = TORCH[spec["op"]](spec, x, w)
    grads = torch.autograd.grad(y, [*x, *w], dy.to(device, dtype))
    names = ["y"] + [f"dx{i}" for i in range(len(x))] + [f"dw{i}" for i in range(len(w))]
    return {name: t.detach().double().cpu() for name, t in zip(names, [y, *grads])}

def beside(ours, theirs):
    """Where PyTorch's is not a number, ours need not be one."""
    return ours / theirs if math.isfinite(theirs) else 0.0

def compare(dtype, unit):
    specs, tensors, kept = {}, {}, {}
    for name, spec, xs, ws in cases():
        x, w = made(spec, xs, ws, dtype)
        with torch.no_grad():
            shape = TORCH[spec["op"]](spec, [t.float() for t in x], [t.float() for t in w]).shape
        dy = torch.randn(shape).to(dtype)
        specs[name], kept[name] = spec, (x, w, dy)
        tensors.update({f"{name}/{kind}{i}": t for kind, ts in (("x", x), ("w", w)) for i, t in enumerate(ts)})
        tensors[f"{name}/dy"] = dy
    with tempfile.TemporaryDirectory() as folder:
        given, done = os.path.join(folder, "given"), os.path.join(folder, "done")
        save_file({k: t.contiguous() for k, t in tensors.items()}, given, {"ops": json.dumps(specs)})
        subprocess.run([a.dblaunch, "bench", "ops", given, done, "--device", a.device], check=True)
        ours = load_file(done)
    worst = 0
    for name, spec in specs.items():
        x, w, dy = kept[name]
        exact = theirs(spec, x, w, dy, torch.float64, "cpu")
        torchs = theirs(spec, x, w, dy, dtype, theirs_on)
        for part, want in exact.items():
            scale, most = want.square().mean().sqrt(), want.abs().max()
            off = [(got - want).abs() for got in (ours[f"{name}/{part}"].double(), torchs[part])]
            # max() of Python's would pass over what is not a number.
            rms = [(e.square().mean().sqrt() / scale).nan_to_num(torch.inf).clamp(min=0.25 * unit).item() for e in off]
            top = [(e.max() / most).nan_to_num(torch.inf).clamp(min=0.5 * unit).item() for e in off]
            line = {"dtype": str(dtype)[6:], "op": name, "of": part, "rms": rms, "max": top}
            if dtype == torch.float32:
                ratio = max(rms[0], top[0]) / FP32_BOUND
                line["ours/bound"] = round(ratio, 4)
            else:
                ratio = max(beside(*rms), beside(*top))
                line["ours/torch"] = round(ratio, 3)
            worst = max(worst, ratio)
            print(json.dumps(line), flush=True)
    return worst

began = time.monotonic()
print(json.dumps({"torch": torch.__version__, "ours on": a.device, "theirs on": theirs_on}), flush=True)
capable = a.device == "cpu" or theirs_on == "cpu" or torch.cuda.get_device_capability() >= (8, 0)
single = compare(torch.float32, 0.0)
print(json.dumps({"worst fp32 of the bound": single, "seconds": round(time.monotonic() - began, 1)}), flush=True)
halves = [(torch.float16, 2**-11)] + ([(torch.bfloat16, 2**-8)] if capable else [])
worst = max(compare(dtype, unit) for dtype, unit in halves)
print(json.dumps({"worst ours/torch": worst, "worst fp32 of the bound": single, "seconds": round(time.monotonic() - began, 1)}))
sys.exit(worst > 2 or single > 1)
