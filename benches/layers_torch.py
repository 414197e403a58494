#!/usr/bin/env python3
"""Times one level of SD 1.5's UNet (forward, backward, AdamW) in PyTorch + diffusers beside `dblaunch bench layers`, in turn.

usage: layers_torch.py DBLAUNCH [--rounds 5] [--batch 1] [--latent 64] [--dtype f32|bf16]
Needs torch and diffusers; no part of the test command."""
import argparse, json, os, statistics, subprocess, sys, time
os.environ.update(MKL_DYNAMIC="FALSE", OMP_NUM_THREADS="2", MKL_NUM_THREADS="2")
import torch
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D

p = argparse.ArgumentParser()
p.add_argument("dblaunch"); p.add_argument("--rounds", type=int, default=5); p.add_argument("--batch", type=int, default=1)
p.add_argument("--latent", type=int, default=64); p.add_argument("--dtype", default="f32")
a = p.parse_args()
torch.set_num_threads(2); torch.manual_seed(0)
block = CrossAttnDownBlock2D(num_layers=2, in_channels=320, out_channels=320, temb_channels=1280, add_downsample=False,
    num_attention_heads=8, cross_attention_dim=768, downsample_padding=1, resnet_groups=32, resnet_eps=1e-5, resnet_act_fn="silu")
block.train()
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[a.dtype]
optimizer = torch.optim.AdamW(block.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
x = torch.randn(a.batch, 320, a.latent, a.latent); temb = torch.randn(a.batch, 1280); context = torch.randn(a.batch, 77, 768)

def torch_step():
    t0 = time.perf_counter()
    xs = x.clone().requires_grad_(); ts = temb.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        y, _ = block(xs, ts, encoder_hidden_states=context)
    y = y.float(); t1 = time.perf_counter()
    y.backward(y.detach() * (2 / y.numel())); t2 = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(block.parameters(), 1.0)
    optimizer.step(); optimizer.zero_grad(); t3 = time.perf_counter()
    return {"forward": t1 - t0, "backward": t2 - t1, "update": t3 - t2, "total": t3 - t0}

def ours():
    out = subprocess.run([a.dblaunch, "bench", "layers", "--batch", str(a.batch), "--latent", str(a.latent), "--repeats", "2", "--dtype", a.dtype],
        stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])["steps"]

torch_step()
theirs, mine = [], []
for _ in range(a.rounds):
    theirs += [torch_step(), torch_step()]; mine += ours()
for part in ("forward", "backward", "update", "total"):
    t, m = (statistics.median(s[part] for s in steps) for steps in (theirs, mine))
    print(f"{part:9} torch {t*1e3:9.1f} ms   dblaunch {m*1e3:9.1f} ms   torch/dblaunch {t/m:5.2f}")
