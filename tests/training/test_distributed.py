"""Several processes, and several micro-batches, do what one process does in one pass."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from helpers.processes import free_port, join_one_of_two
from helpers.stages import CPU, LENGTHS, run_config, self_forcing_config
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

import train
from train import SimplifiedTrainer
from training.config import PretrainConfig
from training.distributed import ONE_PROCESS, Processes, mean_figures, processes_of_environment
from training.sharding import whole
from training.stages import PretrainStage, SelfForcingStage

KINDS = {
    "mixed": {"objective": "mixed", "switch_probability": 0.5},
    "teacher_forcing": {"objective": "teacher_forcing", "clean_prefix_probability": 0.0},
    "dmd": {"loss": "dmd"}, "sid": {"loss": "sid"}, "gan": {"loss": "gan"},
    "diffusion_forced": {"generator_inputs": "diffusion_forced"},
    "long": {"window_frames": 6, "rollout_frames": 15, "switch_probability": 0.5},
}
PRETRAINING = {"num_steps": 10, "warmup_steps": 2, **LENGTHS}
NUM_STEPS = 4


def build(kind: str, teacher_path: Path, processes: Processes = ONE_PROCESS, **changes: object) -> PretrainStage | SelfForcingStage:
    """A stage that clips hard, so that what is clipped, and when, shows."""
    changes = {**KINDS[kind], "batch_size": 4, "clip_norm": 0.01, **changes}
    is_pretraining = "objective" in changes
    training = PretrainConfig(**(PRETRAINING | changes)) if is_pretraining else self_forcing_config(teacher_path, **changes)
    torch.manual_seed(0)
    make = PretrainStage if is_pretraining else SelfForcingStage
    return make(run_config(training), CPU, torch.Generator().manual_seed(0), processes)


def run(
    stage: PretrainStage | SelfForcingStage, num_steps: int = NUM_STEPS
) -> tuple[list[list[Tensor]], list[dict[str, float]], list[int]]:
    """The gradients that the optimizers got, the figures, and the prompts that were read."""
    gradients, prompts, clip = [], [], stage.parts.clip

    def recording_clip(parameters, clip_norm):
        parameters = list(parameters)
        norm = clip(parameters, clip_norm)
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
        return norm

    def recording(read):
        return lambda seed, indices, *rest: prompts.extend(indices) or read(seed, indices, *rest)

    stage.parts.clip = recording_clip
    stage.data.captions, stage.data.sample = recording(stage.data.captions), recording(stage.data.sample)
    return gradients, [stage.train_step(step) for step in range(num_steps)], prompts


def assert_same_training(actual, expected) -> None:
    (gradients, figures, _), (wanted, wanted_figures, _) = actual, expected
    assert len(gradients) == len(wanted) and any(g.abs().max() > 0 for g in wanted[0])
    for one, other in zip(gradients, wanted, strict=True):
        assert_close(one, other, rtol=1e-3, atol=2e-6)
    for one, other in zip(figures, wanted_figures, strict=True):
        for name in ("loss_critic", "loss_generator", "loss_causal", "loss_bidirectional", "gradient_norm", "gradient_norm_generator",
                     "gradient_norm_critic", "num_frames", "first_frame"):
            if name in other:
                assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_equal_the_large_batch(kind, teacher):
    parts, whole = build(kind, teacher, accumulation_steps=2), build(kind, teacher)
    assert_same_training(run(parts), run(whole))
    assert torch.equal(parts.random.generator.get_state(), whole.random.generator.get_state())


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_gives_the_same_gradients_from_less_memory(kind, teacher):
    kept, results = [], []
    for is_on in (False, True):
        stage, sizes = build(kind, teacher, activation_checkpointing=is_on), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel() * x.element_size()) or x, lambda x: x):
            results.append(run(stage))
        kept.append(sum(sizes))
    assert_same_training(*results)
    assert kept[1] < 0.7 * kept[0]


def worker(rank: int, port: int, folder: Path, teacher_path: Path) -> None:
    processes = join_one_of_two(rank, port)
    results = {}
    for kind in KINDS:
        stage = build(kind, teacher_path, processes)
        results[kind] = (run(stage), stage.state_dict()["generator_state_dict"])
    config = run_config(PretrainConfig(**(PRETRAINING | {"num_steps": 2, "batch_size": 4, "eval_videos": 0, "checkpoint_interval": 1})))
    saved, linked = [], []  # by this process
    save, link = train.save_checkpoint, train.point_to_latest
    train.save_checkpoint = lambda path, checkpoint: saved.append(path.name) or save(path, checkpoint)
    train.point_to_latest = lambda path, target: linked.append(path.name) or link(path, target)
    trainer = SimplifiedTrainer(replace(config, log_dir=str(folder / "runs"), run_name="run"), processes)
    results["folder"] = str(trainer.train())
    results["written"] = [*saved, *linked]
    results["writes"] = type(trainer.log).__name__
    results["speaks"] = processes.may_speak()
    processes.leave()
    torch.save(results, folder / f"{rank}.pt")


def test_two_processes_equal_one(teacher, tmp_path):
    multiprocessing.spawn(worker, (free_port(), tmp_path, teacher), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for kind in KINDS:
        expected = run(build(kind, teacher))
        (results, weights), (other_results, other_weights) = first[kind], second[kind]
        for name, value in weights.items():
            assert torch.equal(value, other_weights[name]), f"{kind}: {name}"
        averaged = [mean_figures(pair) for pair in zip(results[1], other_results[1], strict=True)]
        assert_same_training((results[0], averaged, []), expected)
        assert not set(results[2]) & set(other_results[2]) and set(results[2]) | set(other_results[2]) == set(expected[2])
        if kind != "diffusion_forced":  # where every video has exit steps of its own
            assert len({tuple(f.get("exit_step") for f in figures) for figures in (results[1], other_results[1], expected[1])}) == 1
    assert first["folder"] == second["folder"] and [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["run"]
    assert [first["written"], second["written"]] == [["checkpoint_0000001.pt", "checkpoint_final.pt", "checkpoint_final.pt"], []]
    assert [first["writes"], second["writes"]] == ["RunLog", "SilentLog"] and first["speaks"] != second["speaks"]


def sharding_worker(rank: int, port: int, folder: Path, teacher_path: Path, kinds: list[str], changes: dict[str, object]) -> None:
    processes = join_one_of_two(rank, port)
    results = {}
    for kind in kinds:
        stage = build(kind, teacher_path, processes, sharding="fsdp2", **changes)
        sharded = [value for network in stage.networks().values() for value in network.parameters() if isinstance(value, DTensor)]
        shares = sum(value.to_local().numel() for value in sharded) / sum(value.numel() for value in sharded)
        gradients, figures, prompts = run(stage)
        average = stage.average["generator"] if isinstance(stage, PretrainStage) else stage.engine.generator_average
        results[kind] = (whole(gradients), figures, prompts), whole(average.state_dict()), shares
    processes.leave()
    torch.save(results, folder / f"{rank}.pt")


@pytest.mark.parametrize("kinds, changes", [
    (["dmd"], {}),
    pytest.param(list(KINDS), {}, marks=pytest.mark.slow),
    pytest.param(list(KINDS), {"activation_checkpointing": True}, marks=pytest.mark.slow),
    pytest.param(list(KINDS), {"accumulation_steps": 2}, marks=pytest.mark.slow),
], ids=["dmd", "all", "activation checkpointing", "accumulation"])
def test_sharded_networks_have_the_gradients_of_whole_ones(kinds, changes, teacher, tmp_path):
    """Of every kind of loss, clipped over all shards, and the same moving average; each process holds half of every block."""
    multiprocessing.spawn(sharding_worker, (free_port(), tmp_path, teacher, kinds, changes), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for kind in kinds:
        stage = build(kind, teacher)
        expected = run(stage)
        (results, average, share), (other_results, other_average, other_share) = first[kind], second[kind]
        assert_same_training((results[0], [mean_figures(pair) for pair in zip(results[1], other_results[1], strict=True)], []), expected)
        wanted = stage.average["generator"] if isinstance(stage, PretrainStage) else stage.engine.generator_average
        for name, value in wanted.state_dict().items():
            assert torch.equal(average[name], other_average[name])
            # Muon's matrices are left out: its bfloat16 iteration magnifies rounding, and what they do shows in the later steps' gradients.
            if not (isinstance(stage, PretrainStage) and name.startswith("blocks.") and value.ndim == 2):
                assert (average[name] - value).abs().mean() < 1e-4, f"{kind}: {name}"
        assert share + other_share == pytest.approx(1) and 0.4 < share < 0.6


def test_a_batch_that_cannot_be_shared_is_refused(teacher):
    with pytest.raises(ValueError, match=r"training.batch_size is 4.*multiple of 3 .*accumulation_steps=3\); nearest valid: 3 or 6"):
        build("dmd", teacher, accumulation_steps=3)


def test_an_incomplete_environment_is_refused_and_none_is_one_process():
    assert processes_of_environment({}) == ONE_PROCESS and ONE_PROCESS.may_speak()
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: start with torchrun"):
        processes_of_environment({"WORLD_SIZE": "2"})
