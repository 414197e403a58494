#!/usr/bin/env python3
"""Records bitsandbytes' 8-bit code books and what it makes of some numbers, for src/optim/blockwise.rs (needs torch,
numpy, safetensors, bitsandbytes; recorded with bitsandbytes 0.50.2, torch 2.15).

usage: make.py

Writes beside itself blockwise.safetensors. For `signed` and `unsigned`: NAME.book, the 256 numbers of
create_dynamic_map; NAME.values, NAME.codes and NAME.absmax, a tensor of whole blocks of 256 and what quantize_blockwise
made of it; NAME.back, what dequantize_blockwise made of those.

The codes are those of bitsandbytes' reference in PyTorch (its "default" backend), called past the compiled CPU library:
that one looks numbers up in 65,536 steps, so that its codes of small numbers, zero among them, are others."""
import os
import numpy as np, torch
import bitsandbytes.functional as F
from safetensors.numpy import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
BLOCK = 256
REFERENCE = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)


def reference(name, *arguments):
    return getattr(torch.ops.bitsandbytes, name).default.redispatch(REFERENCE, *arguments)


def values(signed, book, random):
    """Blocks of numbers of many kinds; magnitudes unless signed."""
    def scaled(exponents):
        return (10.0 ** exponents).astype(np.float32)

    normal = random.standard_normal((4, BLOCK)).astype(np.float32)
    wide = random.standard_normal((4, BLOCK)).astype(np.float32) * scaled(random.uniform(-8, 0, (4, BLOCK)))
    # Just between two numbers of the book, and the neighbours of those: the scale is a power of two, so they stay what
    # they are.
    between = ((book[:-1] + book[1:]) / np.float32(2)).astype(np.float32)
    near = [between, np.nextafter(between, np.float32(2)), np.nextafter(between, np.float32(-2)), book[:-1]]
    near = np.stack([np.append(x, np.float32(1)) for x in near]) * np.float32([[1.0], [0.25], [2.0**40], [2.0**-40]])
    small = random.standard_normal((3, BLOCK)).astype(np.float32) * np.float32([[1e-37], [1e-40], [1e-44]])
    sparse = np.where(random.uniform(size=(2, BLOCK)) < 0.05, normal[:2], np.float32(0)).astype(np.float32)
    zeros = np.zeros((1, BLOCK), np.float32)
    large = normal[:2] * np.float32([[1e30], [1e37]])
    all_of_them = np.concatenate([x.ravel() for x in [normal, wide, near, small, sparse, zeros, large]])
    return all_of_them.astype(np.float32) if signed else np.abs(all_of_them)


random = np.random.default_rng(4)
tensors = {}
for name, signed in [("signed", True), ("unsigned", False)]:
    book = F.create_dynamic_map(signed=signed)
    x = torch.from_numpy(values(signed, book.numpy(), random))
    codes, absmax = reference("quantize_blockwise", x, book, BLOCK)
    back = reference("dequantize_blockwise", codes, absmax, book, BLOCK, torch.float32)
    for key, tensor in [("book", book), ("values", x), ("codes", codes), ("absmax", absmax), ("back", back)]:
        tensors[f"{name}.{key}"] = np.ascontiguousarray(tensor.numpy())
save_file(tensors, os.path.join(HERE, "blockwise.safetensors"))
