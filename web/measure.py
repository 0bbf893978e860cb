"""Speed of the page and of torch on the same machine: `python -m web.measure` writes results/web.json. Page (headless Chromium, WASM) and
torch (float32, batch 1) take turns; processor time depends far less on the load of the machine than wall time."""

from __future__ import annotations

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

import torch

from demo import BUILT
from machine.paths import PRETRAINED, REPOSITORY, user_path
from machine.runtime import Runtime, describe_machine
from sampling.samplers import SamplerSettings
from sampling.streaming import stream_video
from training.checkpoint import load_networks
from web.browse import use_page, what_is_missing

PROMPT = "the digit 3 moving to the right"
WARM_UP = 8  # blocks, until the window is full


def measure_torch(num_blocks: int, num_threads: int) -> dict[str, float]:
    """Frames/s, processor seconds per frame and milliseconds to the first block, of the student in float32."""
    torch.set_num_threads(num_threads)
    networks = load_networks(PRETRAINED / "streaming.pt", torch.device("cpu"))
    plan = SamplerSettings().make_plan(networks.config.training)
    start = time.perf_counter()
    stream = stream_video(
        networks.generator, networks.text_encoder, [PROMPT], [1], plan, Runtime(torch.device("cpu"), torch.float32), WARM_UP + num_blocks
    )
    next(stream)
    first = time.perf_counter() - start
    for _ in range(WARM_UP - 1):
        next(stream)
    start, cpu = time.perf_counter(), time.process_time()
    num_frames = sum(block.shape[1] for block in stream)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return {"frames_per_second": num_frames / seconds, "cpu_seconds_a_frame": cpu_seconds / num_frames, "first_block_ms": 1000 * first}


def measure_page(num_blocks: int, num_threads: int, timeout: float) -> dict[str, float]:
    """The same for the page, drawing included, and the bytes and the milliseconds of its first load, warm-up included."""
    num_frames = 3 * num_blocks
    orders = [
        ["ready"], ["slide", "#speed", 63], ["frames", 3 * WARM_UP],
        ["read", "first", "parseFloat(document.querySelector('#first-frame').textContent)"],
        ["read", "ready", "Number(document.body.dataset.ready)"],
        ["cpu", "cpu_before"], ["clock", "before"], ["frames", num_frames], ["cpu", "cpu_after"], ["clock", "after"],
        ["read", "device", "document.querySelector('#device').textContent"],
    ]
    seen = use_page(BUILT, orders, f"?backend=wasm&threads={num_threads}&prompt={PROMPT.replace(' ', '+')}", timeout=timeout)
    values = seen["values"]
    return {
        "frames_per_second": num_frames / (values["after"] - values["before"]),
        "cpu_seconds_a_frame": (values["cpu_after"] - values["cpu_before"]) / num_frames,
        "first_block_ms": values["first"], "load_ms": values["ready"], "bytes": seen["bytes"], "device": values["device"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the page beside torch, in turns.", allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num_blocks", type=int, default=40)
    parser.add_argument("--num_threads", type=int, default=min(os.cpu_count() or 1, 2))
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each order to the browser")
    parser.add_argument("--output", type=user_path, default=REPOSITORY / "results" / "web.json")
    arguments = parser.parse_args(argv)
    if (missing := what_is_missing()) is not None:
        sys.exit(f"error: {missing}")
    found: dict[str, list[dict[str, Any]]] = {"page": [], "torch": []}
    load: list[float] = []
    for _ in range(arguments.repeats):
        load.append(os.getloadavg()[0])
        found["page"].append(measure_page(arguments.num_blocks, arguments.num_threads, arguments.timeout))
        found["torch"].append(measure_torch(arguments.num_blocks, arguments.num_threads))
        print(found["page"][-1], found["torch"][-1], flush=True)
    medians = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0] if key not in ("bytes", "device")}
        for name, runs in found.items()
    }
    facts = {
        "machine": describe_machine(arguments.num_threads), "load_before_each_turn": load, "num_blocks": arguments.num_blocks,
        "bytes_of_first_load": found["page"][0]["bytes"], "medians": medians, "runs": found,
    }
    arguments.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{arguments.output}: {json.dumps(medians)}")


if __name__ == "__main__":
    main()
