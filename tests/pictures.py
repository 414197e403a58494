#!/usr/bin/env python3
"""How far the pictures of one folder are from those of another, in levels of 255; needs nothing but Python.

usage: pictures.py FOLDER OTHER [--most LEVELS] [--beside THIRD]
Exit status 1 if a picture's number differs by more than LEVELS; or if OTHER's pictures are further from FOLDER's than twice as
far as THIRD's, on average (and a tenth of a level) or at most (and a level). PNG of 8 bits, as `dblaunch sample` writes it."""
import argparse, os, struct, sys, zlib

def numbers(path):
    """Of a picture's pixels, row by row."""
    with open(path, "rb") as file:
        data = file.read()
    at, packed = 8, b""
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        if kind == b"IHDR":
            width, height, bits, colours, _, _, interlaced = struct.unpack(">IIBBBBB", data[at + 8:at + 8 + length])
        elif kind == b"IDAT":
            packed += data[at + 8:at + 8 + length]
        at += 12 + length
    assert (bits, colours, interlaced) == (8, 2, 0), f"{path} is of another kind"
    rows, step, above, out = zlib.decompress(packed), 3 * width, bytes(3 * width), bytearray()
    for row in range(height):
        how, line = rows[row * (step + 1)], bytearray(rows[row * (step + 1) + 1:(row + 1) * (step + 1)])
        for i in range(step):
            a, b, c = line[i - 3] if i >= 3 else 0, above[i], above[i - 3] if i >= 3 else 0
            # The nearest of the three to a + b - c.
            nearest = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            line[i] = (line[i] + (0, a, b, (a + b) // 2, nearest)[how]) & 255
        out += line
        above = line
    return out

def apart(folder, other):
    """On average and at most."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".png"))
    assert names and names == sorted(name for name in os.listdir(other) if name.endswith(".png")), f"{folder} and {other} hold other pictures"
    off = [abs(a - b) for name in names for a, b in zip(numbers(os.path.join(folder, name)), numbers(os.path.join(other, name)), strict=True)]
    return sum(off) / len(off), max(off)

p = argparse.ArgumentParser()
p.add_argument("folder"); p.add_argument("other"); p.add_argument("--most", type=int); p.add_argument("--beside")
a = p.parse_args()
mean, most = apart(a.folder, a.other)
print(f"{a.other}: {mean:.4f} levels apart on average, {most} at most", end="")
bad = a.most is not None and most > a.most
if a.beside:
    mean_of_third, most_of_third = apart(a.folder, a.beside)
    print(f"; {a.beside}: {mean_of_third:.4f} and {most_of_third}", end="")
    bad = bad or mean > 2 * mean_of_third + 0.1 or most > 2 * most_of_third + 1
print()
sys.exit(bad)
