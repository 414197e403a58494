#!/usr/bin/env python3
"""Thins recorded runs of the peer's training scripts to what tests/it/parity.rs compares (needs numpy, safetensors).

usage: make_expected.py REFERENCE_DIR CASE...

For every case writes tests/data/parity/CASE/: draws.safetensors (without batches that were loaded but not trained; images
shown before are left out), log.json, and expected.safetensors: of each gradient of step 1 and each final
weight the norm (of the gradient; of the weight's movement) and SAMPLES elements, evenly spaced. Names are in the metadata."""
import json, os, shutil, sys
import numpy as np
from safetensors.numpy import load_file, save_file

SAMPLES = 16
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "parity")
PARTS = {"UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder"}
# micro-batches whose images are kept; later ones show the same images again
IMAGES_OF = {"sd15_offset_snr": 0, "sd21v_full": 0, "sd15_prior_te": 3}

def sample(x):
    x = x.reshape(-1).astype(np.float32)
    return x[(np.arange(SAMPLES) * len(x)) // SAMPLES]

def bare(name):
    return name.removeprefix("text_model.")

def folder(path):
    out = {}
    for f in sorted(os.listdir(path)):
        if f.endswith(".safetensors"): out.update(load_file(os.path.join(path, f)))
    return out

def thin(reference, case):
    source, target = os.path.join(reference, case), os.path.join(HERE, case)
    os.makedirs(target, exist_ok=True)
    draws = load_file(f"{source}/draws.safetensors")
    trained = {k.split(".")[0] for k in draws if k.endswith(".noise")}
    keep = {k: v for k, v in draws.items() if k.split(".")[0] in trained and not (k.endswith("pixel_values") and int(k[:6]) >= IMAGES_OF.get(case, 1 << 30))}
    save_file(keep, f"{target}/draws.safetensors")
    shutil.copy(f"{source}/log.json", target)
    gradients = {}
    for name, v in load_file(f"{source}/grads.safetensors").items():
        cls, rest = name.split(".", 1)
        gradients[f"{PARTS[cls]}.{bare(rest)}"] = v
    model = os.path.join(reference, "models", "sd21v" if case.startswith("sd21v") else "sd15")
    finals = {}
    for part in sorted({n.split(".", 1)[0] for n in gradients}):
        start = {bare(k): v for k, v in folder(f"{model}/{part}").items()}
        for name, v in folder(f"{source}/final/{part}").items():
            if bare(name) in start: finals[f"{part}.{bare(name)}"] = (v, v.astype(np.float64) - start[bare(name)])
    g, f = sorted(gradients), sorted(finals)
    save_file({
        "gradient_norms": np.array([np.linalg.norm(gradients[n].astype(np.float64)) for n in g]),
        "gradient_samples": np.stack([sample(gradients[n]) for n in g]),
        "final_samples": np.stack([sample(finals[n][0]) for n in f]),
        "movement_norms": np.array([np.linalg.norm(finals[n][1]) for n in f]),
        "elements": np.array([finals[n][0].size for n in f], dtype=np.int64),
    }, f"{target}/expected.safetensors", metadata={"gradients": json.dumps(g), "finals": json.dumps(f)})

for case in sys.argv[2:]: thin(sys.argv[1], case)
