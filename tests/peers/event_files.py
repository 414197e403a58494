"""Shows that TensorBoard's own reader loads what a run wrote with `trackers = ["jsonl", "tensorboard"]`.

    python tests/peers/event_files.py OUTPUT_DIR

Needs the package `tensorboard` (2.x). It compares the event files in OUTPUT_DIR/logs, read by TensorBoard's
EventAccumulator, with OUTPUT_DIR/metrics.jsonl: every optimizer step once, the same numbers; the configuration as text;
the validation pictures, where the run made some, as in OUTPUT_DIR/samples. Ends with status 1 where they differ.
Not part of `cargo test`, which reads the files with a small reader of its own.
"""

import json
import math
import pathlib
import sys

from tensorboard.backend.event_processing import event_accumulator


def main(output_dir: pathlib.Path) -> None:
    sizes = {"scalars": 0, "images": 0, "tensors": 0}  # keep all of everything
    events = event_accumulator.EventAccumulator(str(output_dir / "logs"), size_guidance=sizes)
    events.Reload()
    tags = events.Tags()

    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "grad_norm" in row]
    names = ["loss", "lr", "grad_norm", "images_per_second", "peak_rss_bytes"]
    if any(row["peak_vram_bytes"] for row in rows):
        names.append("peak_vram_bytes")
    for name in names:
        scalars = events.Scalars(name)
        assert [s.step for s in scalars] == [row["step"] for row in rows], f"{name}: other steps"
        for scalar, row in zip(scalars, rows):
            wanted = row[name]
            same = not math.isfinite(scalar.value) if wanted is None else math.isclose(scalar.value, wanted, rel_tol=1e-6)
            assert same, f"{name} at step {scalar.step}: {scalar.value}, not {wanted}"

    (text,) = events.Tensors("config")[-1].tensor_proto.string_val
    config = "\n".join(line[4:] for line in text.decode().splitlines())
    assert config.strip() == (output_dir / "config.toml").read_text().strip(), "another configuration"

    index = output_dir / "samples" / "index.jsonl"
    pictures = list(map(json.loads, index.read_text().splitlines())) if index.exists() else []
    for picture in pictures:
        images = {image.step: image for image in events.Images(f"validation/{picture['number']}")}
        stored = (output_dir / "samples" / picture["file"]).read_bytes()
        assert images[picture["step"]].encoded_image_string == stored, f"another picture: {picture['file']}"

    print(f"{len(rows)} steps of {', '.join(names)}; {len(pictures)} pictures; the configuration: all as the run wrote them")
    print("tags:", {kind: found for kind, found in tags.items() if found})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
