"""Every paradigm of configs/training from its own YAML: it trains, says what it sees, resumes bit for bit, and fits the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import compose
from helpers.networks import save_untrained
from helpers.stages import CPU, assert_same, snapshot

from machine.paths import CONFIGS
from method.plans import BidirectionalPlan, few_step_plan, many_step_plan, warp_steps
from method.settings import PretrainConfig
from network.attention import ContextWindow
from sampling.samplers import SamplerSettings, sample
from tiny_causal_wan import TinyCausalWanModel
from train import STAGES, SimplifiedTrainer
from training import few_step
from training.checkpoint import CheckpointError, load_checkpoint, load_networks, save_checkpoint
from training.config import Config, config_to_dict
from training.few_step import FewStepStage, consistency_loss, ode_regression_loss
from training.resumable import Sampler, Stage
from training.stages import SelfForcingStage

TINY = [
    "device=cpu", "precision=float32", "wandb.mode=disabled", "model.frame_size=16", "model.width=24", "model.num_layers=2",
    "model.num_heads=2", "model.ffn_ratio=2", "model.text_width=32", "text.width=32", "dataset.frame_size=16", "dataset.digit_size=8",
    "training.num_steps=4", "training.batch_size=2", "training.min_num_frames=6", "training.max_num_frames=6", "training.teacher_steps=2",
    "training.eval_videos=0", "training.sample_interval=0",
]
SELF_FORCING = ["training.dfake_gen_update_ratio=2", "training.critic_warmup_steps=1"]
PARADIGMS = {
    "teacher_forcing": ["training=teacher_forcing"],
    "diffusion_forcing": ["training=diffusion_forcing"],
    "causal_ode": ["training=causal_ode", "training.trajectory_steps=4"],
    "bidirectional_ode": ["training=causal_ode", "training.trajectory_steps=4", "training.trajectory_teacher=bidirectional"],
    "causal_consistency": ["training=causal_consistency", "training.consistency_steps=4"],
    "causvid": ["training=causvid", *SELF_FORCING],
    "tf_dmd": ["training=tf_dmd", *SELF_FORCING],
    "self_forcing": ["training=self_forcing", *SELF_FORCING],
    "sid": ["training=published_exits", "training.loss=sid", *SELF_FORCING],
    "gan": ["training=published_exits", "training.loss=gan", *SELF_FORCING],
    "long": ["training=long_self_forcing", "training.generator_checkpoint=null", "training.window_frames=6",
             "training.rollout_frames=15", *SELF_FORCING],
}

def composed(name: str, teacher: Path, *overrides: str) -> Config:
    return compose.composed(*PARADIGMS[name], *TINY, f"training.pretrained_checkpoint={teacher}", *overrides)


def build(name: str, teacher: Path, seed: int = 0, *overrides: str) -> Stage:
    config = composed(name, teacher, *overrides)
    torch.manual_seed(seed)
    return STAGES[config.training.training_type](config, CPU, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A checkpoint of pretraining with random weights everywhere."""
    return save_untrained(tmp_path_factory.mktemp("teacher") / "teacher.pt", compose.composed("training=pretrain", *TINY))


def save(stage: Stage, config: Config, path: Path) -> Path:
    header = {"step": 2, "training_type": config.training.training_type, "config": config_to_dict(config)}
    save_checkpoint(path, {**header, **stage.state_dict()})
    return path


@pytest.mark.parametrize("name", PARADIGMS)
def test_every_paradigm_trains_and_resumes_bit_for_bit(name, teacher, tmp_path):
    """2 steps, a checkpoint file, a stage of another seed, 2 more steps; against 4 steps in one go."""
    unbroken, second = build(name, teacher), build(name, teacher, 1)
    start, text_encoder = snapshot(unbroken.networks()["generator"]), snapshot(unbroken.text_encoder)
    figures = [unbroken.train_step(step) for step in range(2)]
    second.load_state_dict(load_checkpoint(save(unbroken, composed(name, teacher), tmp_path / "half.pt")), "half.pt")
    assert_same(second.state_dict(), unbroken.state_dict(), "loaded")
    for step in range(2, 4):
        figures.append(unbroken.train_step(step))
        assert second.train_step(step) == figures[-1]
    assert_same(second.state_dict(), unbroken.state_dict(), "final")
    assert all(figure.keys() <= set(unbroken.columns) for figure in figures)
    assert not torch.equal(snapshot(unbroken.networks()["generator"]), start)
    assert torch.equal(snapshot(unbroken.text_encoder), text_encoder)  # else what starts from one teacher does not fit together
    assert unbroken.state_dict()["prompts_drawn"] == {0: 8}  # as many as the teacher's: both count from 0


@pytest.mark.parametrize("name", ["causal_ode", "bidirectional_ode", "causal_consistency", "teacher_forcing"])
def test_what_a_paradigm_ships_starts_a_generator_and_is_sampled_as_it_was_trained(name, teacher, tmp_path):
    stage, config = build(name, teacher), composed(name, teacher)
    for step in range(2):
        stage.train_step(step)
    path = save(stage, config, tmp_path / "start.pt")
    started = build("sid", teacher, 0, f"training.generator_checkpoint={path}")
    averaged = load_checkpoint(path)["generator_ema_state_dict"]
    assert_same(dict(started.engine.generator.state_dict()), dict(averaged), "generator")
    training = load_networks(path, torch.device("cpu")).config.training
    plan = SamplerSettings().make_plan(training)
    if name == "teacher_forcing":
        assert plan == many_step_plan(2, training.time_shift, 3, training.guidance, context=ContextWindow(6))
    else:
        assert plan == few_step_plan(training, context=ContextWindow(6))
    assert SamplerSettings(denoising_steps=(1000, 400)).make_plan(training).times == warp_steps([1000, 400], training.time_shift)
    samples = {name: sample(each, ["a 3", "a 4 moving up"], [1, 2], 6, stage.runtime) for name, each in stage.shown().items()}
    first = "causal, 2 steps" if name == "teacher_forcing" else "teacher, 2 steps"
    assert list(samples)[:4] == [first, "no guidance, 4 steps", "guided, 4 steps", "guided, 2 steps"]
    assert all(video.shape == (2, 6, 1, 16, 16) for video in samples.values())


@pytest.mark.parametrize(("name", "is_causal"), [("causal_ode", True), ("bidirectional_ode", False)])
def test_trajectories_meet_the_students_times_and_every_block_meets_each(name, is_causal, teacher, monkeypatch):
    stage, asked = build(name, teacher), []

    def record(student, trajectory, steps, prompt, config):
        asked.append(steps)
        torch.testing.assert_close(trajectory.times, torch.tensor([*stage.plan.times, *([] if is_causal else [0.0])]))
        assert student is stage.student and config is stage.config
        return ode_regression_loss(student, trajectory, steps, prompt, config)

    monkeypatch.setattr(few_step, "ode_regression_loss", record)
    stage.train_step(0)
    orders = torch.stack(asked)  # (S, B, K)
    assert (orders.sort(dim=0).values == torch.arange(4 if is_causal else 5)[:, None, None]).all()
    assert len(orders.flatten(1).unique(dim=1).T) > 1  # blocks have their own orders


@contextmanager
def times_asked(network: TinyCausalWanModel) -> Iterator[set[float]]:
    """Every time at which the network runs within."""
    found: set[float] = set()
    run = network._pass

    def record(x_t, t, *rest):
        found.update(t.unique().tolist())
        return run(x_t, t, *rest)

    network._pass = record
    try:
        yield found
    finally:
        del network._pass


CONTINUOUS = {  # trainings with times from a whole range, and how near to each of inference's they come in a few steps
    "pretrain": 0.1, "teacher_forcing": 0.1, "diffusion_forcing": 0.1, "causal_consistency": 1e-6,
}
TIMED = {
    **PARADIGMS, "published_exits": ["training=published_exits", *SELF_FORCING], "pretrain": ["training=pretrain", "training.clip_steps=0"],
    "context_noise": ["training=self_forcing", "training.context_noise=100", *SELF_FORCING],
    "exit_by_block": ["training=published_exits", "training.same_exit_step=false", *SELF_FORCING],
}


@pytest.mark.parametrize("name", TIMED)
def test_training_covers_every_time_at_which_inference_asks_the_network(name, teacher, monkeypatch):
    """CausVid without 0 among its times, at which finished blocks enter the cache, was a third as good as with it."""
    monkeypatch.setitem(PARADIGMS, name, TIMED[name])
    stage = build(name, teacher, 0, "training.num_steps=40")
    live = stage.networks()["generator"]
    with times_asked(live) as trained:
        for step in range(16):
            stage.train_step(step)
    wishes = {"num_steps": 4, "guidance": 1.0} if isinstance(stage.config, PretrainConfig) else {}
    plan = SamplerSettings(**wishes).make_plan(stage.config)
    with times_asked(live) as asked:
        sample(Sampler(live, stage.text_encoder, plan), ["a 3"], [1], 6, CPU)
    assert len(asked) >= 4 and (isinstance(plan, BidirectionalPlan) or plan.context_time in {round(time, 6) for time in asked})
    gaps = {time: min(abs(time - other) for other in trained) for time in asked}
    assert max(gaps.values()) <= (CONTINUOUS[name] if name in CONTINUOUS else 1e-6), gaps


def test_every_training_of_the_configuration_is_tried_for_its_times():
    tried = {override.partition("=")[2] for overrides in TIMED.values() for override in overrides if override.startswith("training=")}
    assert tried == {path.stem for path in (CONFIGS / "training").glob("*.yaml")}


def test_consistency_is_with_the_average_along_the_teacher(teacher, monkeypatch):
    stage, asked = build("causal_consistency", teacher), []
    monkeypatch.setattr(few_step, "consistency_loss", lambda *arguments: asked.append(arguments) or consistency_loss(*arguments))
    stage.train_step(0)
    ((student, target, of_teacher, x_0, *_),) = asked
    assert student is stage.student and target is stage.average and of_teacher is stage.teacher
    assert torch.equal(x_0, stage.data.sample(0, range(2), 6).video)


@pytest.mark.parametrize("name", ["sid", "bidirectional_ode"])
def test_a_causal_network_is_refused_as_bidirectional_teacher(name, teacher, tmp_path):
    config = composed("teacher_forcing", teacher)
    path = save(build("teacher_forcing", teacher), config, tmp_path / "tf.pt")
    with pytest.raises(CheckpointError, match="tf.pt was trained with objective=teacher_forcing.*bidirectional teacher is needed"):
        build(name, path)
    assert isinstance(build("causal_ode", path), FewStepStage)  # and is welcome as a causal one


@pytest.mark.parametrize(("name", "calls"), [
    ("teacher_forcing", ["forward_teacher_forced"] * 2), ("diffusion_forcing", ["forward_block_causal"] * 2),
])
def test_forcing_takes_causal_steps_only(name, calls, teacher, monkeypatch):
    stage, seen = build(name, teacher), []

    def watch(method: str) -> None:
        forward = getattr(stage.model, method)
        monkeypatch.setattr(stage.model, method, lambda *arguments: seen.append((method, arguments[1])) or forward(*arguments))

    for method in ("forward_teacher_forced", "forward_block_causal", "forward_bidirectional"):
        watch(method)
    for step in range(2):
        assert "loss_causal" in stage.train_step(step)
    assert [method for method, _ in seen] == calls and all((t > 0).all() for _, t in seen)  # no clean prefix


@pytest.mark.parametrize(
    ("name", "sees_videos"), [("sid", False), ("gan", True), ("causvid", True), ("causal_ode", False)]
)
def test_videos_are_drawn_only_where_the_run_says_so(name, sees_videos, teacher, monkeypatch):
    stage, drawn = build(name, teacher), []
    sample = stage.data.sample
    monkeypatch.setattr(stage.data, "sample", lambda *arguments: drawn.append(arguments) or sample(*arguments))
    stage.train_step(0)
    assert bool(drawn) == sees_videos
    if isinstance(stage, SelfForcingStage):
        assert stage.config.uses_videos == sees_videos


def test_a_few_step_run_end_to_end_leaves_a_checkpoint_and_names_its_data(teacher, tmp_path, capsys):
    config = composed("causal_consistency", teacher, f"log_dir={tmp_path}", "run_name=run", "training.checkpoint_interval=2")
    folder = SimplifiedTrainer(config).train()
    assert {path.name for path in folder.glob("*.pt")} == {"checkpoint_0000002.pt", "checkpoint_final.pt"}
    assert load_checkpoint(folder / "checkpoint_final.pt")["training_type"] == "causal_consistency"
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith("causal_consistency: consistency distillation, on real videos; on cpu")
