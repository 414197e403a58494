#!/usr/bin/env python3
"""Measures a state file's writes and reads beside fio's: `dblaunch bench disk` and fio in turn, in one folder, with the
same bytes, block size and depth (io_uring, direct), each over room that it has written before.

usage: disk_fio.py DBLAUNCH --dir DIR [--bytes 1073741824] [--rounds 9]
Needs fio; takes twice `bytes` of the drive meanwhile; no part of the test command."""
import argparse, json, os, statistics, subprocess

p = argparse.ArgumentParser()
p.add_argument("dblaunch"); p.add_argument("--dir", required=True)
p.add_argument("--bytes", type=int, default=1 << 30); p.add_argument("--rounds", type=int, default=9)
a = p.parse_args()
path = os.path.join(a.dir, f"fio-{os.getpid()}.bin")

def fio(way, depth, block):
    out = subprocess.run(["fio", "--name=state", f"--filename={path}", f"--size={a.bytes}", f"--rw={way}", f"--bs={block}", f"--iodepth={depth}",
        "--ioengine=io_uring", "--direct=1", "--refill_buffers=0", "--output-format=json"], stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(out[out.index("{"):])["jobs"][0][way]["bw_bytes"]

def ours():
    out = subprocess.run([a.dblaunch, "bench", "disk", "--dir", a.dir, "--bytes", str(a.bytes), "--rounds", "1"],
        stdout=subprocess.PIPE, check=True, text=True).stdout
    row = json.loads(out.strip().splitlines()[-1])
    assert row["ring"] and row["direct"], f"no io_uring or no direct I/O here, which fio is told to use: {row}"
    return row

theirs, mine = {"write": [], "read": []}, {}
try:
    fio("write", 4, 1 << 20)
    for _ in range(a.rounds):
        row = ours()
        for way in theirs:
            theirs[way].append(fio(way, row["depth"], row["block"]))
            for request in row["requests"]:
                mine.setdefault((request["request"], way), []).extend(request[way])
        print(f"depth {row['depth']:2}, block {row['block'] >> 10:4} KiB:", *(
            f"{way} fio {theirs[way][-1]/1e9:.2f}, dblaunch " + " ".join(f"{mine[key][-1]/1e9:.2f}" for key in mine if key[1] == way) for way in theirs), sep="  ")
finally:
    if os.path.exists(path): os.remove(path)
for (request, way), speeds in sorted(mine.items()):
    t, m = statistics.median(theirs[way]), statistics.median(speeds)
    print(f"{way:5} requests of {request >> 20:2} MiB: fio {t/1e9:.2f} GB/s   dblaunch {m/1e9:.2f} GB/s   dblaunch/fio {m/t:.2f}")
