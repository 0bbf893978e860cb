"""Exported graphs against the network: whole streams in onnxruntime equal those in torch."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.generation import STUDENT, TEACHER, write_networks
from helpers.stages import CPU

from dynamic_video_sf import Past, PromptSwitch, make_noise_streams
from machine.paths import PRETRAINED
from method.plans import RolloutPlan
from sampling.streaming import stream_video
from training.checkpoint import CheckpointError, LoadedNetworks, load_networks

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -r web/requirements.txt")

from helpers.onnx_stream import OnnxNetwork, OnnxStream, RollingCache  # noqa: E402  needs the packages

from web.export import export_network, main, plans_of, round_weights  # noqa: E402  needs the packages

TOLERANCE = 1e-3  # of a pixel, whose range is [-1, 1]
FIRST, CHANGES = "a handwritten 3 moving up", {3: "the digit seven drifting left slowly", 6: "a 0"}
Exported = tuple[LoadedNetworks, OnnxNetwork]  # a network in torch and in onnxruntime


def exported(checkpoint: Path, folder: Path) -> Exported:
    export_network(checkpoint, folder)
    return round_weights(load_networks(checkpoint, CPU.device)), OnnxNetwork(folder)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("student")
    return exported(write_networks(folder / "network.pt", STUDENT), folder / "exported")  # its blocks enter the cache with noise


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("teacher")
    return exported(write_networks(folder / "network.pt", TEACHER), folder / "exported")


def numpy_noise(seed: int):
    """The noise of `make_noise_streams`, as `OnnxStream` asks for it."""
    stream = make_noise_streams([seed])[0]
    return lambda shape: stream.standard_normal(shape[1:], dtype=np.float32)[None]


def plan_with(networks: LoadedNetworks, name: str, window: int, sink: int) -> RolloutPlan:
    plan = plans_of(networks)[name]
    return replace(plan, context=replace(plan.context, window_frames=window, sink_frames=sink))


def worst_difference(networks: LoadedNetworks, network: OnnxNetwork, name: str, window: int, sink: int, how: str, blocks: int) -> float:
    """Of any pixel of a stream with two prompt switches, between torch and onnxruntime."""
    plan = plan_with(networks, name, window, sink)
    expected = stream_video(networks.generator, networks.text_encoder, [FIRST], [7], plan, CPU, blocks, how)
    found = OnnxStream(network, FIRST, numpy_noise(7), network.facts["plans"][name], window, sink)
    differences = []
    for block in range(blocks):
        if block in CHANGES:
            found.switch(CHANGES[block], how)
        reference = expected.send([CHANGES[block]] if block in CHANGES else None).numpy()
        differences.append(np.abs(reference - found.next_block()).max())
    assert np.abs(reference).max() > 0.1  # a stream of nothing would agree with anything
    print(f"{name}, window {window}, sink {sink}, {how}: differs by {max(differences):.1e}")
    return max(differences)


@pytest.mark.parametrize(("window", "sink"), [(21, 0), (9, 1), (12, 4)])
@pytest.mark.parametrize("how", ["recache", "keep", "reset"])
def test_a_stream_equals_torchs(student: Exported, window: int, sink: int, how: str):
    assert worst_difference(*student, "student", window, sink, how, 11) < TOLERANCE


@pytest.mark.parametrize("plan", ["guided", "no guidance"])
def test_the_start_equals_torchs_with_and_without_guidance(teacher: Exported, plan: str):
    assert worst_difference(*teacher, plan, 9, 3, "recache", 9) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("window", "sink", "how"), [(21, 0, "recache"), (12, 3, "recache"), (12, 4, "keep")])
def test_the_shipped_student_equals_torchs(tmp_path: Path, window: int, sink: int, how: str):
    networks, network = exported(PRETRAINED / "streaming.pt", tmp_path / "student")
    assert sum(file["bytes"] for file in network.facts["files"].values()) < 9e6
    assert worst_difference(networks, network, "student", window, sink, how, 14) < TOLERANCE


@pytest.mark.parametrize(("window", "sink"), [(9, 0), (12, 4), (21, 3), (15, 5)])
def test_changing_the_window_recaches(teacher: Exported, window: int, sink: int):
    networks, network = teacher
    plan = plan_with(networks, "no guidance", window, sink)
    stream = OnnxStream(network, FIRST, numpy_noise(7), network.facts["plans"]["no guidance"], 21, 0)
    blocks = [torch.from_numpy(stream.next_block()) for _ in range(10)]
    stream.change_context(window, sink)
    prompt = networks.generator.encode_prompt(*networks.text_encoder.encode([FIRST]))
    past = Past(networks.generator, plan, make_noise_streams([0]), prompt, None)
    with torch.no_grad():
        for block in blocks[:-1]:
            past.append(block)
        past.append_and_switch(blocks[-1], PromptSwitch(prompt))
        x_t, t = torch.randn(blocks[0].shape, generator=torch.Generator().manual_seed(0)), torch.full((1, 3), 0.75)
        _, expected = past.predict(x_t, t, is_last=True)
    torch.testing.assert_close(torch.from_numpy(stream._caches[0].denoise(x_t.numpy(), 0.75)), expected, atol=TOLERANCE, rtol=0)


def test_prompts_are_read_as_the_text_encoder_reads_them(student: Exported):
    networks, network = student
    for prompt in ("A handwritten 7, drifting UP and to the left!", "", "the Zürich 3 moving left_handed ²", "12 up " * 20):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown words
            expected = networks.generator.encode_prompt(*networks.text_encoder.encode([prompt]))
        found = network.encode(prompt)
        assert np.array_equal(found["prompt_mask"], expected.mask.float().numpy())
        np.testing.assert_allclose(found["prompt_keys"], torch.stack(expected.keys).numpy(), atol=1e-4)
        np.testing.assert_allclose(found["pooled"], expected.pooled.numpy(), atol=1e-4)


def test_the_pixels_that_a_gpu_is_checked_by_are_those_of_the_graphs(student: Exported):
    _, network = student
    facts, cache = network.facts, RollingCache(network, network.encode(""))
    shape = (1, facts["block_frames"], facts["channels"], facts["frame_size"], facts["frame_size"])
    x_t = np.sin(np.arange(np.prod(shape))).astype(np.float32).reshape(shape)
    cache.write(cache.denoise(x_t, 1.0), 0.0, 0, facts["window_frames"], 0)
    found = cache.denoise(x_t, 1.0).flatten()
    np.testing.assert_allclose(found[:: found.size // len(facts["check"])], facts["check"], atol=TOLERANCE)
    cache.clear()
    assert np.abs(found - cache.denoise(x_t, 1.0).flatten()).max() > TOLERANCE  # the cache has a part in them


@pytest.mark.parametrize("changes", [{"independent_first_frame": True, "min_num_frames": 10, "max_num_frames": 22}, {"window_frames": 3}])
def test_what_no_graph_can_hold_is_refused_in_one_line(tmp_path: Path, changes: dict):
    path = write_networks(tmp_path / "other.pt", replace(STUDENT, **changes))
    with pytest.raises(CheckpointError, match="other.pt cannot be exported: .*expected|other.pt cannot be exported: .*export"):
        export_network(path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path):
    networks = load_networks(write_networks(tmp_path / "large.pt", STUDENT), CPU.device)
    networks.generator.head.bias.data[0] = 1e6
    with pytest.raises(ValueError, match="head.bias does not fit float16: its largest entry is 1e\\+06"):
        round_weights(networks)


def test_a_file_that_is_no_checkpoint_ends_in_one_line(tmp_path: Path):
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit, match=r"error: .*broken\.pt"):
        main(["--student", str(tmp_path / "broken.pt"), "--output_dir", str(tmp_path / "out")])
