"""The built page in headless Chromium, used by mouse and keyboard, its pixels read back.

Needs chromium and node, `npm ci` and `npm run build` in the folder web. Run with `python -m pytest tests/web -m browser`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.generation import STUDENT, TEACHER, write_networks

from demo import BUILT, unpacked
from dynamic_video_sf import PromptSwitch, rollout_blocks
from judging.digit_judge import load_judge, read_videos
from machine.paths import PRETRAINED
from network.text_encoder import parse_caption
from sampling.samplers import SamplerSettings
from training.checkpoint import load_networks
from web.archive import write_archive
from web.browse import use_page, what_is_missing

pytestmark = pytest.mark.browser
if (missing := what_is_missing()) is not None:
    pytest.skip(missing, allow_module_level=True)

TIMEOUT = float(os.environ.get("PAGE_TEST_TIMEOUT", "120"))  # seconds for any one thing to happen
PLAY, PAUSED = "", "?paused"
STEP = ["step", "video"]
DEVICE, MESSAGE = (f"document.querySelector('#{name}')" for name in ("device", "message"))
FIRST_BLOCK = [["ready"], ["waitFor", "window.recorded.length >= 3"], ["recorded", "first"], ["blur"]]
READ_MESSAGE = [["waitFor", f"!{MESSAGE}.hidden"], ["read", "message", f"{MESSAGE}.textContent"]]


def on_page(folder: Path, orders: list[list[Any]], query: str = PLAY, **options: Any) -> dict[str, Any]:
    return use_page(folder, orders, query, timeout=TIMEOUT, **options)


def videos_of(recorded: list[dict[str, Any]], canvas: str = "video-student") -> torch.Tensor:
    """Frames (1, F, 1, H, W) in [-1, 1] of one canvas."""
    frames = np.array([each["pixels"] for each in recorded if each["id"] == canvas], dtype=np.float32)
    side = int(frames.shape[1] ** 0.5)
    return torch.from_numpy(frames / 127.5 - 1).reshape(1, -1, 1, side, side)


class PageNoise:
    """`Noise` of web/src/noise.ts in numpy, as the rollout asks for it."""

    def __init__(self, seed: int):
        self._seed, self._place = np.uint32(seed), 0

    def standard_normal(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        count = np.arange(self._place, self._place + np.prod(shape), dtype=np.uint64)
        self._place += len(count)
        key = _mixed(self._seed ^ _mixed(np.zeros(1, np.uint32)))
        words = _mixed(key + (count * np.uint64(0x9E3779B9)).astype(np.uint32)).astype(np.float64)
        radius, angle = np.sqrt(-2 * np.log((words[::2] + 1) / 2**32)), 2 * np.pi * words[1::2] / 2**32
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(shape).astype(dtype)


def _mixed(word: np.ndarray) -> np.ndarray:
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))


@pytest.fixture(scope="module")
def small_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The built page with tiny untrained networks, for tests of all but the pictures' content."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -r web/requirements.txt")
    from web.export import export_network

    folder = tmp_path_factory.mktemp("small") / "page"
    shutil.copytree(BUILT, folder, ignore=shutil.ignore_patterns("networks"))
    for name, training in (("student", replace(STUDENT, context_noise=0)), ("start", TEACHER)):
        export_network(write_networks(folder.parent / f"{name}.pt", training), folder / "networks" / name)
    yield folder
    shutil.rmtree(folder)


def test_the_page_shows_the_networks_own_video():
    """Pixels of blocks that are stepped through, with a prompt switch by a key, equal those of the rollout in torch from the same noise."""
    read = ["read", "prompt", "document.querySelector('#prompt').value"]
    orders = [*FIRST_BLOCK, STEP, STEP, ["press", "7"], STEP, STEP, read]
    seen = on_page(BUILT, orders, f"{PAUSED}&seed=5&backend=wasm")
    assert not seen["errors"]
    shown = videos_of(seen["values"]["first"] + seen["values"]["video"])
    networks = load_networks(PRETRAINED / "streaming.pt", torch.device("cpu"))
    model, encode = networks.generator, networks.text_encoder.encode
    with torch.no_grad():
        first, second = (model.encode_prompt(*encode([prompt])) for prompt in ("the digit 3 moving to the right", seen["values"]["prompt"]))
        blocks = rollout_blocks(model, first, [PageNoise(5)], None, SamplerSettings().make_plan(networks.config.training))
        switches = [None, None, None, PromptSwitch(second, "recache"), None]
        expected = torch.cat([blocks.send(switch) for switch in switches], dim=1)
    assert parse_caption(seen["values"]["prompt"]).digits == (7,) and shown.shape == expected.shape
    assert (shown - expected).abs().max() < 1 / 255 + 2e-3  # half a step of 8 bits, and rounding


def test_the_page_draws_the_asked_digit_before_and_after_a_switch():
    orders = [
        ["ready"], ["slide", "#speed", 63], ["blur"], ["frames", 100, "before"], ["press", "7"], ["frames", 100, "after"],
        ["read", "cache", "document.querySelector('#cache-words').textContent"],
    ]
    seen = on_page(BUILT, orders, "?seed=3")
    assert not seen["errors"]
    readings = (read_videos(load_judge(), videos_of(seen["values"][name])) for name in ("before", "after"))
    before, after = (read.probabilities.argmax(-1).flatten() for read in readings)
    changed = int((after == 7).int().argmax())  # a buffered block, one being made, and a few until the digit has changed
    shown = after[changed : changed + 42]  # two windows: how long a stream keeps its digit is a figure of the network (docs/long_video.md)
    assert (before == 3).float().mean() > 0.8 and changed <= 45 and (shown == 7).float().mean() > 0.8, (before, after)
    assert "In the window" in seen["values"]["cache"]


@pytest.mark.slow
def test_memory_stays_flat_over_2000_frames(small_page: Path):
    orders = [["ready"], ["slide", "#speed", 63], ["frames", 500], ["memory", "early"], ["frames", 1500], ["memory", "late"]]
    seen = on_page(small_page, orders)
    assert not seen["errors"]
    grown = seen["values"]["late"] - seen["values"]["early"]
    print(f"grown by {grown / 1e6:.1f} MB from {seen['values']['early'] / 1e6:.1f} MB over 1,500 frames")
    assert grown < 12e6  # 1,500 frames that were kept would be 6 MB of pixels and more than 60 MB of caches


@pytest.mark.parametrize("is_isolated", [True, False])
def test_without_webgpu_the_page_runs_in_wasm_and_without_the_headers_in_one_thread(small_page: Path, is_isolated: bool):
    orders = [["ready"], ["frames", 12], ["read", "device", f"{DEVICE}.textContent"], ["read", "has", "crossOriginIsolated"]]
    seen = on_page(small_page, orders, is_isolated=is_isolated)
    assert not seen["errors"] and seen["values"]["has"] is is_isolated
    threads = min(os.cpu_count() or 1, 4) if is_isolated else 1
    assert seen["values"]["device"] == f"WASM, {threads} thread{'s' if threads > 1 else ''}"


def test_webgpu_draws_what_wasm_draws(small_page: Path):
    """On Chromium's GPU in software (SwiftShader): the same kernels as on a real one, slowly. With a switch, a window and a sink."""
    orders = [
        *FIRST_BLOCK, ["read", "device", f"{DEVICE}.textContent"], STEP, STEP, STEP, ["slide", "#window", 9], ["slide", "#sink", 3],
        ["press", "7"], STEP, STEP,
    ]
    seen = {name: on_page(small_page, orders, f"{PAUSED}&seed=5&backend={name}", gpu=name == "webgpu") for name in ("webgpu", "wasm")}
    assert not seen["webgpu"]["errors"] and seen["webgpu"]["values"]["device"] == "WebGPU"
    ours, theirs = (videos_of(each["values"]["first"] + each["values"]["video"]) for each in seen.values())
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 2 / 255 + 1e-3  # a step of 8 bits


def test_windows_sinks_and_switches_show_in_the_strip(small_page: Path):
    frames, prompts = (f"document.querySelector('#cache').dataset.{name}" for name in ("frames", "prompts"))
    cache = f"[{frames}, {prompts}]"
    orders = [
        ["ready"], ["blur"], STEP, STEP, STEP, STEP, ["read", "whole", cache],
        ["slide", "#window", 9], ["slide", "#sink", 3], ["waitFor", f"{frames} === '0,1,2,12,13,14'"], ["read", "sunk", cache],
        ["check", "input[value=keep]"], ["blur"], ["press", "8"], STEP, ["read", "kept", cache],
        ["check", "input[value=reset]"], ["blur"], ["press", "1"], ["waitFor", f"{frames} === ''"], ["read", "reset", cache],
        ["read", "words", "document.querySelector('#cache-words').textContent"],
    ]
    values = on_page(small_page, orders, PAUSED)["values"]
    assert values["whole"][0] == ",".join(map(str, range(12)))  # of five blocks the last is not in the cache yet
    assert values["sunk"][0] == "0,1,2,12,13,14"
    assert values["kept"] == ["0,1,2,12,13,14", "0,0,0,0,0,0"]
    assert values["reset"][0] == "" and values["words"].startswith("Empty")


def test_words_buttons_and_arrow_keys_say_the_same(small_page: Path):
    prompt, digit = "document.querySelector('#prompt').value", "document.querySelector('input[name=digit]:checked').value"
    direction = "document.querySelector('input[name=direction]:checked').value"
    orders = [
        ["ready"], ["blur"], ["press", "ArrowUp"], ["read", "up", prompt], ["hold", "ArrowLeft", "ArrowDown"], ["read", "diagonal", prompt],
        ["check", "input[name=digit][value='9']"], ["read", "clicked", prompt], ["check", "input[value=fast]"], ["read", "fast", prompt],
        ["fill", "#prompt", "a shiny four gliding up and to the right"], ["click", "#say"],
        ["read", "digit", digit], ["read", "direction", direction],
        ["read", "warning", "document.querySelector('#warning').textContent"],
    ]
    values = on_page(small_page, orders, PAUSED)["values"]
    assert values["up"] == "the digit 3 moving up" and values["diagonal"] == "the digit 3 moving down and to the left"
    assert values["clicked"] == "the digit 9 moving down and to the left" and values["fast"] == f"{values['clicked']} quickly"
    assert (values["digit"], values["direction"]) == ("4", "1")
    assert values["warning"].startswith("Unknown words left out of the prompt: shiny. Known words: 0, 1,")


def test_the_start_runs_beside_the_student_and_every_tour_ends(small_page: Path):
    tours = [
        order for tour in (1, 2, 3) for order in
        [["click", f"#tour-list button:nth-child({tour})"], *[["frames", 9], ["click", "#tour-next"]] * 2, ["frames", 9],
         ["click", "#tour-end"]]
    ]
    orders = [
        ["ready"], ["slide", "#speed", 63], ["click", "#compare"], ["waitFor", "document.querySelectorAll('#players canvas').length === 3"],
        ["frames", 12, "three"], ["read", "numbers", "[...document.querySelectorAll('#players canvas')].map((each) => each.dataset.frame)"],
        ["click", "#compare"], ["frames", 6], *tours,
    ]
    seen = on_page(small_page, orders)
    assert not seen["errors"] and len(set(seen["values"]["numbers"])) == 1
    guided, unguided = (videos_of(seen["values"]["three"], f"video-{name}") for name in ("guided", "unguided"))
    assert (guided - unguided).abs().max() > 0.1


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1200, "light")])
def test_everything_has_a_name_and_fits_the_width(small_page: Path, width: int, scheme: str):
    unnamed = """[...document.querySelectorAll('button, input, canvas:not([aria-hidden]), progress')].filter((each) => !(
        each.ariaLabel || each.textContent.trim() || [...(each.labels ?? [])].some((label) => label.textContent.trim())
    )).map((each) => each.outerHTML)"""
    contrast = """(() => {
        const style = (selector) => getComputedStyle(document.querySelector(selector));
        const light = (text) => {
            const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((part) => (part / 255) ** 2.2);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const [dark, bright] = [light(style('dt').color), light(style('main > *').backgroundColor)].sort((a, b) => a - b);
        return (bright + 0.05) / (dark + 0.05);
    })()"""
    orders = [
        ["ready"], ["frames", 6], ["read", "width", "document.documentElement.scrollWidth"], ["read", "unnamed", unnamed],
        ["read", "contrast", contrast],
        ["read", "video", "document.querySelector('#video-student').getBoundingClientRect().width"],
    ]
    values = on_page(small_page, orders, viewport={"width": width, "height": 740}, colorScheme=scheme)["values"]
    assert values["width"] <= width and values["unnamed"] == []
    assert values["contrast"] > 4.5 and values["video"] > 200


@pytest.mark.parametrize(("route", "words"), [
    ({"glob": "**/weights.bin", "length": 5000, "type": "application/octet-stream"}, "weights.bin arrived damaged"),
    ({"glob": "**/weights.bin", "abort": True}, "The download of student/weights.bin broke off"),
    ({"glob": "**/engine.worker*.js", "prefix": "WebAssembly.validate=()=>false;", "type": "text/javascript"}, "no WebAssembly SIMD"),
    ({"glob": "**/network.json", "length": 40, "type": "application/json"}, "network.json cannot be read"),
])
def test_what_goes_wrong_is_one_clear_line(small_page: Path, route: dict[str, Any], words: str):
    seen = on_page(small_page, READ_MESSAGE, route=route)
    assert words in seen["values"]["message"] and "\n" not in seen["values"]["message"]


def test_pixels_that_differ_from_the_exports_are_found_before_the_page_is_ready(small_page: Path, tmp_path: Path):
    page, facts = tmp_path / "page", json.loads((small_page / "networks" / "student" / "network.json").read_text())
    shutil.copytree(small_page, page, ignore=shutil.ignore_patterns("start"))
    facts["check"][7] += 0.1
    (page / "networks" / "student" / "network.json").write_text(json.dumps(facts))
    seen = on_page(page, [*READ_MESSAGE, ["read", "data", "({...document.body.dataset})"]])
    told, found = re.search(r"pixels differ by (\S+) from those of the export", seen["values"]["message"]), seen["values"]["data"]
    assert told and float(told[1]) == pytest.approx(0.1, abs=1e-3) and "ready" not in found


def test_an_archive_streams_without_node(small_page: Path, tmp_path: Path):
    write_archive(small_page, tmp_path / "page.zip")
    with unpacked(tmp_path / "page.zip") as page:
        seen = on_page(page, [["ready"], ["frames", 6], ["read", "notice", "fetch('NOTICE.txt').then((answer) => answer.text())"]])
    assert not seen["errors"] and "Copyright (c) Microsoft Corporation" in seen["values"]["notice"]


def test_the_first_load_is_small():
    seen = on_page(BUILT, [["ready"]], "?backend=wasm")
    print(f"{seen['bytes']:,} bytes: {seen['files']}")
    assert 8e6 < seen["bytes"] < 20e6
