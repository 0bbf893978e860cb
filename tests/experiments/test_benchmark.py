"""What the benchmark measures is the real code path: the same videos and updates, all of the time, all of the arithmetic."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.networks import SMALL_SIZES, save_untrained
from helpers.stages import CPU, run_config
from torch import nn
from torch.testing import assert_close

from experiments import benchmark, speed
from experiments.benchmark import main
from experiments.compute import flops_per_step
from experiments.public_code import build_public_network, sample_public
from experiments.speed import CACHE, DENOISING, TEXT, block_ends, generate_in_phases, steady_block, train_in_phases
from experiments.timing import REST, WHOLE, Gauge, flop_counter, phase_totals, time_in_turns, watch
from method.plans import RolloutPlan
from network.attention import ContextWindow
from network.text_encoder import TextEncoder
from sampling.samplers import sample
from tiny_causal_wan import ModelConfig, TinyCausalWanModel
from training.checkpoint import LoadedNetworks
from training.config import Config, PretrainConfig, SelfForcingConfig
from training.stages import Sampler, SelfForcingStage

ASKED = (["a 3 moving up", "the digit 5"], [1, 2], 9, CPU)


@pytest.fixture
def sampler(small_model: TinyCausalWanModel, small_text_encoder: TextEncoder) -> Sampler:
    return Sampler(small_model, small_text_encoder, RolloutPlan((1.0, 0.75, 0.5), 3))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Checkpoints of a small untrained teacher and student."""
    trainings = {"teacher": PretrainConfig(teacher_steps=2), "student": SelfForcingConfig(denoising_steps=[1000, 500])}
    return {name: save_untrained(tmp_path / f"{name}.pt", run_config(training)) for name, training in trainings.items()}


def test_the_compiled_student_is_charged_the_plain_ones_flops(sampler: Sampler, monkeypatch: pytest.MonkeyPatch):
    compiled: list[TinyCausalWanModel] = []
    monkeypatch.setattr(TinyCausalWanModel, "compile_passes", lambda model: compiled.append(model))
    networks = LoadedNetworks(sampler.network, sampler.text_encoder, Config(training=SelfForcingConfig()), 0, {}, ("train",))
    samplers = speed.make_samplers(networks, None, ("student", "compiled", "int8"), False, 6, CPU)
    assert compiled == [samplers[name].network for name in ("compiled", "int8")] and samplers["student"].network not in compiled
    totals, _ = speed.count_generation(samplers, 6, CPU)
    assert totals["int8"] == totals["compiled"] == totals["student"] > 0
    plain, same, int8 = (sample(sampler, *ASKED) for sampler in samplers.values())
    assert torch.equal(same, plain) and not torch.equal(int8, plain)  # nothing was compiled here


@pytest.fixture
def training(files: dict[str, Path]) -> Config:
    return run_config(SelfForcingConfig(
        pretrained_checkpoint=str(files["teacher"]), batch_size=2, min_num_frames=6, max_num_frames=6, denoising_steps=[1000, 750, 500],
        dfake_gen_update_ratio=3, critic_warmup_steps=2, finish_blocks=True,
    ))


def ticking() -> Gauge:
    """Counts its own readings: every figure is exact."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


@pytest.mark.parametrize("context_time", [0.0, 0.1])
@pytest.mark.parametrize("window", [None, 3, 6])
def test_the_rollout_without_cache_makes_the_same_videos(sampler: Sampler, window: int | None, context_time: float):
    plan = replace(sampler.plan, context=ContextWindow(window), clamp_x_0=True, context_time=context_time)
    with_cache = replace(sampler, plan=plan)
    without_cache = replace(with_cache, network=speed.WithoutCache(sampler.network, plan))
    assert_close(sample(without_cache, *ASKED), sample(with_cache, *ASKED), atol=1e-4, rtol=1e-4)


def test_contestants_take_turns():
    calls: list[str] = []
    seconds = time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, CPU.device)
    assert calls == ["a", "b"] * 3 and set(seconds) == {"a", "b"} and min(seconds.values()) >= 0


def test_a_watched_call_that_fails_is_read_and_given_back():
    worker = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), watch(ticking(), [(worker, "forward", "f")]) as calls:
        worker(torch.ones(1, 3))
    assert calls == [("f", 1, 2)] and "forward" not in vars(worker)


def test_watching_a_generation_changes_no_bit_and_sees_every_pass(sampler: Sampler):
    videos, calls = generate_in_phases(sampler, *ASKED, ticking())
    assert torch.equal(videos, sample(sampler, *ASKED))
    passes = [TEXT, TEXT, DENOISING, *([DENOISING] * 2 + [CACHE]) * 2, *[DENOISING] * 2]
    assert [name for name, *_ in calls] == [*passes, WHOLE]
    assert sum(phase_totals(calls).values()) == calls[-1][2]
    # readings: 0 is the start, 1 to 4 the text, then 6 a block, of which the first of a cache pass ends the block before; one at the end
    assert block_ends(calls) == [11, 17, 23]


def test_a_steady_block_is_one_that_sees_a_full_window():
    ends = [5.0, 6.0, 8.0, 11.0, 15.0]  # intervals 5 1 2 3 4
    assert steady_block(ends, RolloutPlan((1.0,), 3, context=ContextWindow(9))) == 3
    assert steady_block(ends, RolloutPlan((1.0,), 3, context=ContextWindow(3))) == 2.5  # never the first, which holds the text
    assert steady_block(ends, RolloutPlan((1.0,), 3, context=ContextWindow(21))) == 4
    assert steady_block(ends, RolloutPlan((1.0,), 3)) == 4
    assert steady_block([5.0], RolloutPlan((1.0,), 3, context=ContextWindow(9))) == 5


def pass_flops(config: ModelConfig, num_frames: int, past_frames: int, num_text: int) -> tuple[int, int]:
    """A forward pass of one video by hand: all but the time embedding, and the most that this adds."""
    width, queries = config.width, num_frames * config.tokens_per_patch_row
    keys = queries + past_frames * config.tokens_per_patch_row
    linear = (6 + 2 * config.ffn_ratio) * 2 * queries * width**2  # q k v o, cross q and o, feed-forward
    attention = 2 * 2 * queries * (keys + num_text) * width  # q k^T and the sum over v, to the past and to the text
    ends = 2 * 2 * queries * config.patch_values * width  # patches in, patches out
    return config.num_layers * (linear + attention) + ends, num_frames * 2 * 8 * width**2


def finished_flops(config: ModelConfig, num_frames: int, past_frames: int, num_text: int) -> tuple[int, int]:
    """The same of a finished block that is only written into the cache: of its last layer q, k and v, and no patches out."""
    others, time_embedding = pass_flops(replace(config, num_layers=config.num_layers - 1), num_frames, past_frames, num_text)
    queries = num_frames * config.tokens_per_patch_row
    return others + 3 * 2 * queries * config.width**2 - 2 * queries * config.patch_values * config.width, time_embedding


def test_counted_flops_are_those_of_the_products_by_hand(sampler: Sampler):
    with flop_counter() as counter:
        _, calls = generate_in_phases(sampler, *ASKED, counter.get_total_flops)
    config = sampler.network.config
    counted = [(name, end - begin) for name, begin, end in calls if name in (DENOISING, CACHE)]
    assert [name for name, _ in counted] == [DENOISING] * 3 + [CACHE, DENOISING, DENOISING] * 2
    for index, (name, flops) in enumerate(counted):
        block = index // 3
        passes = [pass_flops(config, 3, 3 * block, 12)]
        if name == CACHE:
            passes.append(finished_flops(config, 3, 3 * (block - 1), 12))
        least, time_embedding = (sum(part) for part in zip(*passes, strict=True))
        assert 2 * least <= flops <= 2 * (least + time_embedding)


def test_attention_is_counted_in_both_directions():
    q = torch.randn(2, 3, 8, 4, requires_grad=True)
    forward = 2 * 2 * (2 * 3) * 8 * 8 * 4
    with flop_counter() as counter:
        out = nn.functional.scaled_dot_product_attention(q, q, q)
        assert counter.get_total_flops() == forward
        out.sum().backward()
    assert counter.get_total_flops() == forward * 3.5  # the scores once more, and a product for each of q, k, v and the weights


def test_watching_a_training_step_changes_no_bit_and_finds_every_phase(training):
    plain, watched = (SelfForcingStage(training, CPU, torch.Generator().manual_seed(3)) for _ in range(2))
    phases: list[list[str]] = []
    for step in range(3):  # the last is the generator's
        figures, calls = train_in_phases(watched, step, ticking())
        assert plain.train_step(step) == figures
        phases.append([name for name, *_ in calls if name != TEXT])
    for ours, theirs in ((plain.engine.generator, watched.engine.generator), (plain.engine.critic, watched.engine.critic)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    critic = ["critic: loss", "critic: backward", *["critic: clipping, optimizer"] * 2, "averages"]
    generator = ["scores", "generator: backward", *["generator: clipping, optimizer"] * 2]
    assert phases[1:] == [["rollout", *critic, WHOLE], ["rollout", *generator, *critic, WHOLE]]


def test_training_flops_over_a_cycle_are_those_that_compute_counts(training, small_products):
    row, = speed.measure_training(training, {"float32": CPU}, 1)
    assert sum(part["flops"] for part in row["split"].values()) == row["whole"]["flops"]
    assert row["whole"]["flops"] == pytest.approx(flops_per_step(training), rel=1e-12)


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch):
    """The machine's limit, measured in no time."""
    monkeypatch.setattr("experiments.timing.MATRIX_SIZES", (64,))
    monkeypatch.setattr("experiments.timing.PRODUCT_FLOPS", 2 * 64**3)


@pytest.fixture
def measure(files: dict[str, Path], tmp_path: Path, small_products, capsys: pytest.CaptureFixture[str]):
    """Runs the command on the small checkpoints; returns the content of its file and what it printed."""

    def run(*options: str) -> tuple[dict, str]:
        output = tmp_path / "speed.json"
        main(["--student", str(files["student"]), "--teacher", str(files["teacher"]), "--num_frames", "6", "--repeats", "1",
              "--device", "cpu", "--output", str(output), *options])
        return json.loads(output.read_text()), capsys.readouterr().out

    return run


def test_every_part_reaches_the_terminal_and_the_file(measure):
    assert speed.cost(2.0, 100.0, 200.0)["share_of_limit"] == 0.25 and speed.cost(0.0, 0.0, 200.0)["share_of_limit"] == 0
    results, shown = measure("--batch_sizes", "1", "2", "--training_batch_size", "1")
    rows = results["generation"]
    assert [(row["batch_size"], row["precision"], row["sampler"]) for row in rows] == [
        (size, precision, sampler) for size in (1, 2) for precision in ("float32", "bfloat16")
        for sampler in ("student", "no cache", "teacher")
    ]
    assert [row["split"] is not None for row in rows] == [row["sampler"] == "student" for row in rows]
    student = rows[0]
    assert set(student["split"]) == {TEXT, DENOISING, CACHE, REST}
    assert sum(part["flops"] for part in student["split"].values()) == student["whole"]["flops"] == rows[6]["whole"]["flops"] / 2
    assert rows[0]["whole"]["flops"] < rows[1]["whole"]["flops"], "without the cache the past is computed again"
    assert [row["precision"] for row in results["training"]] == ["float32", "bfloat16"]
    for row in results["training"]:
        assert row["whole"]["seconds"] == pytest.approx((row["generator_turn_seconds"] + row["critic_turn_seconds"]) / 2)
        assert sum(part["flops"] for part in row["split"].values()) == pytest.approx(row["whole"]["flops"])
        assert {"rollout", "scores", "generator: backward", "critic: loss", "critic: backward", REST} < set(row["split"])
    assert all(text in shown for text in ("first block", "cache pass", "limit:", "rollout", "critic: backward", "writing them"))
    assert "public" not in results  # only where asked for


@pytest.mark.parametrize(("wish", "message"), [
    (["--batch_sizes", "4", "0"], "--batch_sizes is 0: expected at least 1"),
    (["--int8"], "--int8 is the compiled student once more, in 8-bit integers: give --compile too"),
    (["--num_frames", "7"], "num_frames is 7: expected a positive multiple of num_frames_per_block=3"),
    (["--num_frames", "24"], "num_frames is 24: the bidirectional teacher makes at most the 21 frames"),
    (["--parts", "public", "--public_code", "absent"], "--public_code is absent, which lacks wan/modules/model.py: git clone"),
    (["--output", "absent/speed.json"], "in a folder that exists"),
    (["--teacher", "{student}"], "--teacher is no bidirectional teacher"),
])
def test_bad_input_is_one_line_before_anything_is_measured(files, wish, message, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_generation", None)
    wish = [part.format(**files) for part in wish]
    with pytest.raises(SystemExit) as caught:
        main(["--student", str(files["student"]), "--teacher", str(files["teacher"]), "--device", "cpu", *wish])
    assert str(caught.value).startswith("error: ") and message in str(caught.value) and "\n" not in str(caught.value)


PUBLIC_MODEL = "from .attention import flash_attention\nfrom diffusers.models.modeling_utils import ModelMixin\n"
PUBLIC_NETWORK = """
import torch
from wan.modules.attention import attention
from wan.modules.model import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

class CausalWanModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, patch_size, text_len, in_dim, dim, ffn_dim, freq_dim, text_dim, out_dim, num_heads, num_layers):
        super().__init__()
        self.asked, self.layers = [], num_layers
        self.weight = torch.nn.Parameter(torch.zeros(dim, ffn_dim))

    def forward(self, x, t, context, seq_len, kv_cache, crossattn_cache, current_start):
        assert len(kv_cache) == len(crossattn_cache) == self.layers and not crossattn_cache[0]["is_init"]
        kv_cache[0]["k"][:, current_start: current_start + 1] += 1
        self.asked.append((t.unique().item(), current_start, tuple(x.shape)))
        return torch.ones_like(x)
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder laid out as the public code's, whose network says that every velocity is 1."""
    modules = tmp_path / "clone" / "wan" / "modules"
    modules.mkdir(parents=True)
    (modules / "model.py").write_text(PUBLIC_MODEL)
    (modules / "causal_model.py").write_text(PUBLIC_NETWORK)
    return tmp_path / "clone"


def test_the_public_network_is_asked_as_its_pipeline_asks_it_and_leaves_no_modules(clone: Path):
    before, config = dict(sys.modules), ModelConfig(**SMALL_SIZES)
    network = build_public_network(clone, config, 4)
    added = sys.modules.keys() - before.keys()
    assert added <= {"public_self_forcing_model", "public_self_forcing_causal_model"} and network.weight.shape == (24, 48)
    random, times = torch.Generator().manual_seed(0), (1.0, 0.75, 0.5)
    video = sample_public(network, config, torch.randn(1, 4, 32), 9, 3, times, random)
    assert video.shape == (1, 9, 1, 8, 8)
    passes = [*(1000 * time for time in times), 0.0]  # the last writes the cache
    assert network.asked == [(t, 4 * first, (1, 1, 3, 8, 8)) for first in (0, 3, 6) for t in passes]


def test_ours_and_the_public_code_take_turns_and_the_ratio_is_theirs(measure, clone: Path):
    results, shown = measure("--parts", "public", "--public_code", str(clone), "--patch_sizes", "4", "2")
    rows = results["public"]
    assert [row["patch_size"] for row in rows] == [4, 2]
    rates = rows[0]["frames_per_second"]
    assert set(rates) == {"public code", "student"}
    assert f"{rates['student'] / rates['public code']:.2f} times the public code" in shown
