#!/usr/bin/env python3
"""Measures a state file's writes and reads beside fio's: `dblaunch bench disk` and fio pass by pass in turn, in one folder,
with the same bytes, block size and depth (io_uring, direct), each over room that it has written before.

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
        "--ioengine=io_uring", "--direct=1", "--output-format=json"], stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(out[out.index("{"):])["jobs"][0][way]["bw_bytes"]

with subprocess.Popen([a.dblaunch, "bench", "disk", "--wait", "--dir", a.dir, "--bytes", str(a.bytes), "--rounds", str(a.rounds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as bench:
    def ours():
        bench.stdin.write("go\n")
        return json.loads(bench.stdout.readline())
    try:
        file = json.loads(bench.stdout.readline())
        print(file)
        assert file["ring"] and file["direct"], "no io_uring or no direct I/O here, which fio would use"
        fio("write", file["depth"], file["block"])
        speeds = {}
        for i in range(4 * a.rounds):
            way = ("write", "read")[i % 2]
            # Who goes first changes from round to round: what went before shows in some drives.
            if i // 4 % 2: theirs, mine = fio(way, file["depth"], file["block"]), ours()
            else: mine = ours(); theirs = fio(way, file["depth"], file["block"])
            assert mine["way"] == way
            speeds.setdefault((way, mine["request"]), []).append((theirs, mine["bytes_per_second"]))
    finally:
        if os.path.exists(path): os.remove(path)
for (way, request), pairs in sorted(speeds.items()):
    t, m = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    print(f"{way:5} requests of {request >> 20:2} MiB: fio {t/1e9:.2f} GB/s   dblaunch {m/1e9:.2f} GB/s   dblaunch/fio {m/t:.2f}"
          f"   all: {' '.join(f'{t/1e9:.2f}:{m/1e9:.2f}' for t, m in pairs)}")
