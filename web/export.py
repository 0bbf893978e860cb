"""A checkpoint as ONNX graphs for onnxruntime: `python -m web.export` writes the networks that the page shows.

    python -m web.export                                   pretrained/streaming.pt and pretrained/teacher.pt
    python -m web.export --student logs/training/checkpoint_final.pt --start pretrained/teacher.pt

One folder for each network: `denoise.onnx`, `cache.onnx` and `text.onnx` (see `passes`), which share `weights.bin`, and `network.json`,
which says how to use them (see `describe`). Weights are stored once, in float16, and cast to float32 on loading; a tensor that float16
cannot hold exactly, such as a table of rotations, stays in float32. So rounding the weights is the only loss.
"""

from __future__ import annotations

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import argparse
import hashlib
import inspect
import json
import logging
import shutil
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from machine.files import require_writable
from machine.interruption import refusals_in_one_line
from machine.paths import PRETRAINED, REPOSITORY, user_path
from machine.runtime import file_digest
from method.plans import NAIVE_STEPS, RolloutPlan
from method.settings import FewStepConfig
from network.text_encoder import DIGIT_WORDS, DIRECTION_PHRASES, SPEED_WORDS, START_TOKEN, VOCABULARY
from sampling.samplers import SamplerSettings
from training.checkpoint import CheckpointError, LoadedNetworks, load_networks
from web.passes import CachePass, DenoisePass, TextPass

FORMAT = 1  # of network.json: a page refuses another one
FOLDER = REPOSITORY / "web" / "public" / "networks"
OPSET = 20
INLINE_BYTES = 256  # tensors up to this size stay in the graphs
NUM_CHECKED = 32
OUTPUTS = {"text": ["prompt_keys", "prompt_values", "prompt_mask", "pooled"], "denoise": ["x_0"], "cache": ["new_keys", "new_values"]}


def plans_of(networks: LoadedNetworks) -> dict[str, RolloutPlan]:
    """How the page samples a network, by name: a student as it was trained, any other in as many steps, with and without guidance."""
    training = networks.config.training
    if isinstance(training, FewStepConfig):
        return {"student": SamplerSettings().make_plan(training)}
    guided, unguided = SamplerSettings(num_steps=len(NAIVE_STEPS), causal=True), SamplerSettings(tuple(NAIVE_STEPS))
    return {"guided": guided.make_plan(training), "no guidance": unguided.make_plan(training)}


def check_exportable(networks: LoadedNetworks, plan: RolloutPlan, path: Path) -> None:
    """Raise CheckpointError for a network whose blocks or window do not fit graphs of a fixed size."""
    block, window, patch = plan.num_frames_per_block, plan.context.window_frames, networks.config.model.patch_size[0]
    if plan.context.independent_first_frame:
        raise CheckpointError(f"{path} cannot be exported: its first block is a single frame (training.independent_first_frame), and the "
                              "graphs have blocks of one size; export a network that was trained without it")
    if window is None or window <= block or window % patch or block % patch:
        raise CheckpointError(f"{path} cannot be exported: a window of {window} frames with blocks of {block} and temporal patches of "
                              f"{patch}; expected a window larger than a block, and whole patches")


def round_weights(networks: LoadedNetworks) -> LoadedNetworks:
    """The networks with all parameters rounded to float16, in place, as in the graphs. Raises ValueError if one does not fit."""
    for module in (networks.generator, networks.text_encoder):
        for name, parameter in module.named_parameters():
            rounded = parameter.half()
            if not rounded.isfinite().all():
                raise ValueError(f"{name} does not fit float16: its largest entry is {parameter.abs().max():.3g}")
            parameter.data = rounded.float()
    return networks


def example_inputs(networks: LoadedNetworks, cache_rows: int, block_frames: int) -> dict[str, tuple[Tensor, ...]]:
    """Inputs of every graph, in the order of its `forward`."""
    config, num_tokens = networks.config.model, networks.config.text.max_tokens
    video = torch.zeros(1, block_frames, config.channels, config.frame_size, config.frame_size)
    cache = torch.zeros(config.num_layers, 1, config.num_heads, cache_rows * config.tokens_per_patch_row, config.head_size)
    prompt = torch.zeros(config.num_layers, 1, config.num_heads, num_tokens, config.head_size)
    encoded = (prompt, prompt.clone(), torch.ones(1, 1, 1, num_tokens), torch.zeros(1, config.width))
    state = (video, torch.ones(1), cache, cache.clone(), torch.zeros(1, dtype=torch.int64))
    tokens = torch.full((1, num_tokens), START_TOKEN)
    return {"text": (tokens,), "denoise": (*state, *encoded), "cache": (*state, torch.arange(cache_rows), *encoded)}


def check_values(modules: dict[str, nn.Module], inputs: dict[str, tuple[Tensor, ...]]) -> list[float]:
    """Some pixels of x_0 that depend on all three graphs; the page compares them before it trusts a GPU. The noisy block sin(0), sin(1),
    ... is denoised, written into the empty cache and denoised again behind it, without a prompt."""
    x_t, t, keys, values, visible = inputs["denoise"][:5]
    rows, block = len(inputs["cache"][5]), modules["cache"].block_rows
    tokens = torch.zeros_like(inputs["text"][0])
    tokens[0, 0] = START_TOKEN
    x_t = torch.arange(x_t.numel(), dtype=torch.float32).sin().reshape(x_t.shape)
    with torch.no_grad():
        prompt = modules["text"](tokens)
        x_0 = modules["denoise"](x_t, t, keys, values, visible, *prompt)
        keys, values = modules["cache"](x_0, 0 * t, keys, values, visible, torch.arange(rows) + block, *prompt)
        x_0 = modules["denoise"](x_t, t, keys, values, visible + block, *prompt)
    return x_0.flatten()[:: x_0.numel() // NUM_CHECKED].tolist()


def build_graph(module: nn.Module, inputs: tuple[Tensor, ...], name: str) -> onnx.ModelProto:
    """One pass as an ONNX model with its weights inside."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator of torch's own, which ONNX lacks
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            input_names = list(inspect.signature(module.forward).parameters)
            program = torch.onnx.export(
                module.eval(), inputs, dynamo=True, opset_version=OPSET, input_names=input_names, output_names=OUTPUTS[name], verbose=False
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        logging.disable(logging.NOTSET)
    graph = program.model_proto
    for holder in (graph, graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        del holder.metadata_props[:]  # places in the source: more bytes than the graph itself
        holder.doc_string = ""
    return graph


class WeightFile:
    """All weights of a network, each stored once."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._places: dict[tuple[str, tuple[int, ...], bytes], int] = {}

    def move_out(self, graph: onnx.ModelProto, file_name: str) -> None:
        """Move the graph's large tensors here: in float16, followed by a cast, if that loses nothing."""
        casts: list[onnx.NodeProto] = []
        for tensor in graph.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor)
            if values.nbytes <= INLINE_BYTES:
                continue
            with np.errstate(over="ignore"):
                half = values.astype(np.float16)
            if values.dtype == np.float32 and np.array_equal(half.astype(np.float32), values):
                name, half_name = tensor.name, f"{tensor.name}.float16"
                casts.append(onnx.helper.make_node("Cast", [half_name], [name], f"{name}.cast", to=onnx.TensorProto.FLOAT))
                tensor.CopyFrom(onnx.numpy_helper.from_array(half, half_name))
                values = half
            onnx.external_data_helper.set_external_data(tensor, file_name, self._place(values), values.nbytes)
            tensor.ClearField("raw_data")
            tensor.ClearField("doc_string")
        nodes = [*casts, *graph.graph.node]
        del graph.graph.node[:], graph.graph.value_info[:]
        graph.graph.node.extend(nodes)

    def _place(self, values: np.ndarray) -> int:
        raw = values.tobytes()
        key = (values.dtype.str, values.shape, hashlib.sha256(raw).digest())
        if key not in self._places:
            self.content.extend(bytes(-len(self.content) % 64))
            self._places[key] = len(self.content)
            self.content.extend(raw)
        return self._places[key]


def describe(
    networks: LoadedNetworks, plans: dict[str, RolloutPlan], path: Path, cache_rows: int, files: dict[str, Path]
) -> dict[str, Any]:
    """What the page must know beside the graphs: sizes, plans, words and files."""
    config, text, first = networks.config.model, networks.config.text, next(iter(plans.values()))
    return {
        "format": FORMAT,
        "source": {
            "checkpoint": path.name, "sha256": file_digest(path), "training_type": networks.config.training.training_type,
            "step": networks.step,
        },
        "frame_size": config.frame_size, "channels": config.channels, "num_digits": networks.config.dataset.num_digits,
        "block_frames": first.num_frames_per_block, "window_frames": first.context.window_frames, "frames_per_row": config.patch_size[0],
        "cache_rows": cache_rows,
        "cache_shape": [config.num_layers, 1, config.num_heads, cache_rows * config.tokens_per_patch_row, config.head_size],
        "plans": {
            name: {
                **{key: value for key, value in asdict(plan).items() if key not in ("context", "num_frames_per_block")},
                "sink_frames": plan.context.sink_frames,
            } for name, plan in plans.items()
        },
        "text": {"words": list(VOCABULARY), "first_word_token": START_TOKEN + 1, "start_token": START_TOKEN, "max_tokens": text.max_tokens},
        "grammar": {
            "digit_words": DIGIT_WORDS, "directions": [phrases[0] for phrases in DIRECTION_PHRASES],
            "speeds": {speed: words[0] for speed, words in SPEED_WORDS.items()},
        },
        "files": {name: {"name": file.name, "bytes": file.stat().st_size, "sha256": file_digest(file)} for name, file in files.items()},
    }


def export_network(path: Path, folder: Path) -> dict[str, Any]:
    """Write the network of a checkpoint into a folder, replaced in one step; returns what `describe` says. Raises ValueError (of which
    CheckpointError is one) for a file that cannot be exported, OSError for an unwritable folder."""
    networks = round_weights(load_networks(path, torch.device("cpu")))
    plans = plans_of(networks)
    plan = next(iter(plans.values()))
    check_exportable(networks, plan, path)
    model, block = networks.generator, plan.num_frames_per_block
    cache_rows = (plan.context.window_frames - block) // model.config.patch_size[0]
    modules = {
        "text": TextPass(model, networks.text_encoder), "denoise": DenoisePass(model, cache_rows, block),
        "cache": CachePass(model, cache_rows, block),
    }
    inputs = example_inputs(networks, cache_rows, block)
    require_writable(folder.parent, "--output_dir")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
        new, weights = Path(temporary) / folder.name, WeightFile()
        new.mkdir()
        files = {"weights": new / "weights.bin", **{name: new / f"{name}.onnx" for name in modules}}
        for name, module in modules.items():
            graph = build_graph(module, inputs[name], name)
            weights.move_out(graph, files["weights"].name)
            files[name].write_bytes(graph.SerializeToString(deterministic=True))
        files["weights"].write_bytes(weights.content)
        facts = {**describe(networks, plans, path, cache_rows, files), "check": check_values(modules, inputs)}
        (new / "network.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return facts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write ONNX graphs of the page's networks.", allow_abbrev=False)
    parser.add_argument("--student", type=user_path, default=PRETRAINED / "streaming.pt", help="default: pretrained/streaming.pt")
    parser.add_argument(
        "--start", type=user_path, default=PRETRAINED / "teacher.pt", help="the network before Self-Forcing; default: pretrained/teacher.pt"
    )
    parser.add_argument("--output_dir", type=user_path, default=FOLDER, help="default: web/public/networks, from which the page is built")
    arguments = parser.parse_args(argv)
    with refusals_in_one_line("networks that are not named above are as they were"):
        for name, path in (("student", arguments.student), ("start", arguments.start)):
            facts = export_network(path, arguments.output_dir / name)
            size = sum(file["bytes"] for file in facts["files"].values())
            print(f"{arguments.output_dir / name}: {path.name}, {size / 1e6:.2f} MB, plans {', '.join(facts['plans'])}", flush=True)


if __name__ == "__main__":
    main()
