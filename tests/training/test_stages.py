"""The two kinds of training: when each network moves, what resuming restores, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.networks import randomise
from helpers.stages import CPU, LENGTHS, assert_same, build_self_forcing, run_config, self_forcing_config, snapshot

from dynamic_video_sf import make_noise_streams, rollout_blocks
from method.plans import baseline_plans
from network.weights import exponential_decay
from sampling.samplers import sample, sample_few_step
from training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, slim_checkpoint
from training.config import PretrainConfig, config_to_dict
from training.data import draw_num_frames
from training.stages import PretrainStage, SelfForcingStage, rate_factor


def build_pretrain(seed: int = 0, **changes: Any) -> PretrainStage:
    torch.manual_seed(seed)
    training = PretrainConfig(**({"num_steps": 10, "warmup_steps": 2, **LENGTHS} | changes))
    return PretrainStage(run_config(training), CPU, torch.Generator().manual_seed(seed))


def header(training_type: str, stage: PretrainStage | SelfForcingStage) -> dict[str, Any]:
    return {"step": 5, "training_type": training_type, "config": config_to_dict(run_config(stage.config))}


# Self-Forcing


@pytest.mark.parametrize(("changes", "turns"), [
    ({}, [3, 5, 7]), ({"dfake_gen_update_ratio": 1, "critic_warmup_steps": 2}, [2, 3, 4, 5, 6, 7]),
])
def test_generator_moves_every_few_steps_after_the_warm_up_and_the_critic_at_each(changes: dict, turns: list[int], teacher: Path):
    stage, lengths = build_self_forcing(teacher, **changes), set()
    networks = (stage.engine.generator, stage.engine.generator_average, stage.engine.fake_score)
    for step in range(8):
        before = [snapshot(network) for network in networks]
        figures = stage.train_step(step)
        moved = [not torch.equal(earlier, snapshot(network)) for earlier, network in zip(before, networks, strict=True)]
        assert moved == [step in turns, step in turns, True] and ("loss_generator" in figures) == (step in turns), step
        assert figures.keys() <= set(stage.columns) and "loss_critic" in figures
        lengths.add(figures["num_frames"])
    assert stage.num_generator_updates == len(turns) and stage.num_prompts_seen == 16 and len(lengths) > 1
    assert all(parameter.grad is None for network in stage.networks().values() for parameter in network.parameters())


def test_average_follows_the_generator_and_lags(teacher: Path):
    stage = build_self_forcing(teacher, dfake_gen_update_ratio=1, critic_warmup_steps=0, ema_decay=0.5)
    assert torch.equal(snapshot(stage.engine.generator_average), snapshot(stage.engine.generator))
    for step, decay in enumerate((0.1, 2 / 11, 3 / 12)):  # (1 + n) / (10 + n) until it reaches ema_decay
        before = snapshot(stage.engine.generator_average)
        stage.train_step(step)
        live = snapshot(stage.engine.generator)
        torch.testing.assert_close(snapshot(stage.engine.generator_average), decay * before + (1 - decay) * live)
        assert not torch.equal(snapshot(stage.engine.generator_average), live)
    assert exponential_decay(0.9, num_updates=10_000) == 0.9


def test_exit_steps_take_turns_where_blocks_are_finished(teacher: Path):
    stage = build_self_forcing(teacher, dfake_gen_update_ratio=2, critic_warmup_steps=0, finish_blocks=True)
    last = len(stage.engine.plan.times) - 1
    assert [stage.train_step(step)["exit_step"] for step in range(1, 12, 2)] == [last - turn % (last + 1) for turn in range(6)]
    resumed = build_self_forcing(teacher, dfake_gen_update_ratio=2, critic_warmup_steps=0, finish_blocks=True)
    resumed.load_state_dict(stage.state_dict(), "run")
    assert resumed.train_step(13)["exit_step"] == last - 6 % (last + 1) != stage.train_step(12)["exit_step"]


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_average_by_a_power_weighs_every_update_by_its_number(teacher: Path, power: float):
    stage = build_self_forcing(teacher, dfake_gen_update_ratio=1, critic_warmup_steps=0, ema_power=power)
    made = []
    for step in range(4):
        stage.train_step(step)
        made.append(snapshot(stage.engine.generator))
    share = (torch.arange(5, dtype=torch.float64) / 4) ** (power + 1)  # of the first k updates: the integral of k^power
    mean = sum(weight * weights.double() for weight, weights in zip(share.diff().tolist(), made, strict=True))
    torch.testing.assert_close(snapshot(stage.engine.generator_average), mean.float())
    assert not torch.equal(made[0], made[3])


def test_teacher_and_text_encoder_stay_frozen(teacher: Path):
    stage = build_self_forcing(teacher, dfake_gen_update_ratio=1, critic_warmup_steps=0)
    frozen = (stage.engine.real_score, stage.text_encoder)
    before = [snapshot(module) for module in frozen]
    assert torch.equal(before[0], snapshot(stage.engine.generator))  # all three start from the teacher
    for step in range(3):
        stage.train_step(step)
    for module, parameters in zip(frozen, before, strict=True):
        assert torch.equal(snapshot(module), parameters)
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in module.parameters())


def test_the_rollout_carries_a_graph_in_the_generators_turn_only(teacher: Path, monkeypatch):
    stage = build_self_forcing(teacher)
    wanted: list[bool] = []
    rollout = stage.engine.rollout

    def record(prompt: Any, num_frames: int, with_gradient: bool, *others: Any, **options: Any) -> Any:
        result = rollout(prompt, num_frames, with_gradient, *others, **options)
        wanted.append(with_gradient)
        assert result.scored.requires_grad == with_gradient and prompt.pooled.requires_grad == with_gradient
        return result

    monkeypatch.setattr(stage.engine, "rollout", record)
    for step in range(6):
        stage.train_step(step)
    assert wanted == [False, False, False, True, False, True]  # and one rollout a step serves both updates


def test_samples_show_the_averaged_student_by_the_one_rollout(teacher: Path):
    stage = build_self_forcing(teacher, dfake_gen_update_ratio=1, critic_warmup_steps=0)
    for step in range(2):
        stage.train_step(step)
    prompts, seeds = ["a 3 moving up", "the digit 5"], [7, 8]
    samples = {name: sample(each, prompts, seeds, 6, stage.runtime) for name, each in stage.shown().items()}
    few = ["no guidance, 4 steps", "guided, 4 steps", "guided, 2 steps"]
    assert list(samples) == ["teacher, 2 steps", *few, "student, 4 steps"]
    for name, network in ((few[0], stage.engine.real_score), ("student, 4 steps", stage.engine.generator_average)):
        with torch.no_grad():
            prompt = network.encode_prompt(*stage.text_encoder.encode(prompts))
            expected = torch.cat(list(rollout_blocks(network, prompt, make_noise_streams(seeds), 2, stage.engine.plan)), dim=1)
        assert torch.equal(samples[name], expected)
    for name, plan in baseline_plans(stage.config).items():
        assert torch.equal(samples[name], sample_few_step(stage.engine.real_score, stage.text_encoder, prompts, seeds, 6, plan, CPU))
    assert not torch.equal(samples[few[0]], samples["student, 4 steps"])


# Pretraining


def test_pretraining_shows_deformed_digits_where_it_is_asked_to():
    plain, varied = build_pretrain(), build_pretrain(digit_variation=0.3)
    losses = [stage.train_step(0)["loss_bidirectional"] for stage in (plain, varied)]
    assert (plain.data.digit_variation, varied.data.digit_variation) == (0.0, 0.3) and losses[0] != losses[1]


@pytest.mark.parametrize(("changes", "bidirectional"), [
    ({}, [0, 2, 4, 6]), ({"bidirectional_share": 0.0}, []), ({"bidirectional_share": 0.25}, [0, 4]),
    ({"bidirectional_share": 0.75}, [0, 1, 2, 4, 5, 6]), ({"bidirectional_share": 1.0}, list(range(8))),
])
def test_the_share_of_bidirectional_steps_is_kept(changes: dict[str, float], bidirectional: list[int]):
    stage = build_pretrain(**changes)
    figures = [stage.train_step(step) for step in range(8)]
    assert [step for step in range(8) if "loss_bidirectional" in figures[step]] == bidirectional and stage.num_prompts_seen == 16
    assert all(("loss_causal" in each) != ("loss_bidirectional" in each) and each.keys() <= set(stage.columns) for each in figures)


def test_pretraining_trains_network_and_text_encoder_and_averages_both():
    stage = build_pretrain(lr=1e-2)
    for network in stage.networks().values():  # past the zero-initialised head, which lets no gradient through at first
        randomise(network)
    before = {name: parameter.clone() for name, parameter in stage.live.named_parameters()}
    average = snapshot(stage.average)
    for step in range(2):
        stage.train_step(step)
    unmoved = [name for name, parameter in stage.live.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == []
    live = snapshot(stage.live)
    assert not torch.equal(snapshot(stage.average), average) and not torch.equal(snapshot(stage.average), live)


def test_every_parameter_has_exactly_one_optimizer():
    stage = build_pretrain()
    owned = [id(p) for optimizer in stage.optimizers.values() for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in stage.live.parameters())


@pytest.mark.parametrize("loss", ["dmd", "gan"])
def test_under_muon_the_matrices_of_the_blocks_and_nothing_else_are_muons(loss: str, teacher: Path):
    """Both networks are trained whole, and one rate means the same step for either optimizer: MUON_RATE times 0.2 is 1."""
    stage = build_self_forcing(teacher, optimizer="muon", loss=loss, lr=1e-4, critic_lr=3e-4, decay_fraction=0.0)
    for name, network in stage.networks().items():
        of_muon = {id(p) for p in stage.optimizers[f"{name}_muon"].param_groups[0]["params"]}
        of_adamw = {id(p) for p in stage.optimizers[name].param_groups[0]["params"]}
        blocks = stage.engine.generator.blocks if name == "generator" else stage.engine.fake_score.blocks
        assert of_muon == {id(m.weight) for m in blocks.modules() if isinstance(m, torch.nn.Linear)}
        assert of_adamw == {id(p) for p in network.parameters()} - of_muon
    stage.train_step(1)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in stage.optimizers.items()}
    assert rates == pytest.approx({"generator": 1e-4, "generator_muon": 5e-4, "critic": 3e-4, "critic_muon": 1.5e-3})
    decays = {name: rates[name] * optimizer.param_groups[0]["weight_decay"] for name, optimizer in stage.optimizers.items()}
    assert decays["generator_muon"] == pytest.approx(decays["generator"]) and decays["critic_muon"] == pytest.approx(decays["critic"])


def test_rate_factor_warms_up_holds_and_decays():
    stage = build_pretrain(num_steps=100, warmup_steps=4, decay_fraction=0.4)
    factors = [rate_factor(stage.config, step, stage.config.warmup_steps) for step in range(100)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(factors[4:61]) == {1.0}
    assert factors[80] == pytest.approx(0.5) and factors[99] == pytest.approx(1 / 40)
    assert stage.train_step(99)["lr_factor"] == factors[99]
    assert stage.optimizers["muon"].param_groups[0]["lr"] == pytest.approx(factors[99] * stage.config.muon_lr)


@pytest.mark.parametrize("kind", ["pretrain", "dmd2"])
def test_a_stripped_checkpoint_cannot_be_resumed(kind: str, teacher: Path, tmp_path: Path):
    stage = build_pretrain() if kind == "pretrain" else build_self_forcing(teacher)
    save_checkpoint(tmp_path / "full.pt", {**header(kind, stage), **stage.state_dict()})
    slim_checkpoint([tmp_path / "full.pt"], tmp_path / "slim.pt")
    with pytest.raises(CheckpointError, match="slim.pt lacks .*stripped for generation.*resume from a checkpoint in the run's own folder"):
        stage.load_state_dict(load_checkpoint(tmp_path / "slim.pt"), "slim.pt")


def test_clips_first_equal_a_run_on_clips_that_is_resumed_on_whole_videos():
    together = build_pretrain(clip_steps=2, clip_frames=3, clip_batch_size=4, min_num_frames=9)
    clips = build_pretrain(batch_size=4, min_num_frames=3, max_num_frames=3)
    for step in range(2):
        together.train_step(step)
        clips.train_step(step)
    whole = build_pretrain(seed=1, min_num_frames=9)
    whole.load_state_dict(clips.state_dict(), "clips")
    for step in range(2, 4):
        together.train_step(step)
        whole.train_step(step)
    assert together.num_prompts_seen == 2 * 4 + 2 * 2
    assert_same(dict(together.model.state_dict()), dict(whole.model.state_dict()), "clips first")


# The teacher file


def test_a_teacher_of_other_sizes_or_another_text_encoder_is_refused_by_both_sizes(teacher: Path):
    config = run_config(self_forcing_config(teacher), width=36, num_layers=3)
    with pytest.raises(CheckpointError) as caught:
        SelfForcingStage(config, CPU, torch.Generator())
    message = str(caught.value)
    for part in (str(teacher), "model.width=24", "model.width=36", "model.num_layers=2", "model.num_layers=3"):
        assert part in message
    assert "\n" not in message and "num_heads" not in message
    config = run_config(self_forcing_config(teacher))
    config.text.max_tokens = 13
    with pytest.raises(CheckpointError, match="trained with text.max_tokens=12, but this run asks for text.max_tokens=13"):
        SelfForcingStage(config, CPU, torch.Generator())


def test_the_generators_rate_falls_at_the_end_of_the_run_and_the_critics_does_not_and_resuming_takes_the_new_ones(teacher: Path):
    stage = build_self_forcing(teacher, num_steps=20, decay_fraction=0.5, lr=1e-4, critic_lr=3e-4)
    stage.load_state_dict(build_self_forcing(teacher).state_dict(), "run")
    for step, factor in ((9, 1.0), (10, 1.0), (15, 0.5), (19, 0.1)):
        stage.train_step(step)
        rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in stage.optimizers.items()}
        assert rates == pytest.approx({"generator": factor * 1e-4, "critic": 3e-4})


def test_a_generator_can_start_from_another_network_than_the_teacher(teacher: Path, tmp_path: Path):
    start = load_checkpoint(teacher)
    start["generator_state_dict"] = {name: value + 0.1 for name, value in start["generator_state_dict"].items()}
    save_checkpoint(tmp_path / "start.pt", {**start, "prompts_drawn": {0: 3, 7: 5}})
    stage = build_self_forcing(teacher, generator_checkpoint=str(tmp_path / "start.pt"))
    assert_same(dict(stage.engine.generator.state_dict()), start["generator_state_dict"], "generator")
    assert_same(dict(stage.engine.generator_average.state_dict()), start["generator_state_dict"], "average")
    own = dict(load_checkpoint(teacher)["generator_state_dict"])
    assert_same(dict(stage.engine.real_score.state_dict()), own, "teacher")
    assert_same(dict(stage.engine.fake_score.state_dict()), own, "critic")
    assert stage.earlier_prompts == {0: 8, 7: 5}


def test_a_run_has_seen_the_digits_that_its_teacher_and_its_start_have_seen(teacher: Path, tmp_path: Path):
    clean = {**load_checkpoint(teacher), "digits_seen": ["train"]}
    save_checkpoint(tmp_path / "clean.pt", clean)
    assert build_self_forcing(tmp_path / "clean.pt").state_dict()["digits_seen"] == ["train"]
    assert build_self_forcing(teacher).state_dict()["digits_seen"] == ["train", "judge"]
    stage = build_self_forcing(tmp_path / "clean.pt", generator_checkpoint=str(teacher))
    assert stage.state_dict()["digits_seen"] == ["train", "judge"]
    assert build_pretrain().state_dict()["digits_seen"] == ["train"]
    assert build_pretrain(pretrained_checkpoint=str(teacher)).state_dict()["digits_seen"] == ["train", "judge"]


def test_what_was_trained_otherwise_is_refused(teacher: Path, tmp_path: Path):
    stage, other = build_self_forcing(teacher), load_checkpoint(teacher)
    state = stage.state_dict()
    student, encoder, network = (tmp_path / f"{name}.pt" for name in ("student", "encoder", "network"))
    save_checkpoint(student, {**header("dmd2", stage), **state})
    for path, key in ((encoder, "text_encoder_state_dict"), (network, "generator_state_dict")):
        save_checkpoint(path, {**other, key: {name: value + 0.1 for name, value in other[key].items()}})
    for refused, words in (
        (lambda: build_self_forcing(tmp_path / "absent.pt"), "no checkpoint at .*absent.pt"),
        (lambda: build_self_forcing(student), "student.pt is a few-step student.*training.generator_checkpoint=PATH"),
        (lambda: build_self_forcing(teacher, generator_checkpoint=str(encoder)),
         "encoder.pt was trained with another text encoder than the teacher .*teacher.pt: give a"),
        (lambda: build_self_forcing(network).load_state_dict(state, "run.pt"), "run.pt was trained with another teacher than .*network.pt"),
        (lambda: build_self_forcing(teacher, generator_checkpoint=str(teacher)).load_state_dict(state, "run.pt"),
         "generator_checkpoint cannot be combined with training.resume=run.pt"),
        (lambda: build_self_forcing(teacher, optimizer="muon").load_state_dict(state, "run.pt"),
         "training.optimizer is muon: run.pt was trained with adamw; resume it with that"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            refused()
        assert "\n" not in str(caught.value)
    build_self_forcing(teacher, generator_checkpoint=str(student))


def test_numbers_of_frames_are_multiples_of_the_block_within_bounds():
    random = torch.Generator().manual_seed(0)
    config = PretrainConfig(num_frames_per_block=3, min_num_frames=9, max_num_frames=21)
    assert {draw_num_frames(config, random) for _ in range(100)} == {9, 12, 15, 18, 21}
    fixed = PretrainConfig(num_frames_per_block=7, min_num_frames=21, max_num_frames=21)
    assert {draw_num_frames(fixed, random) for _ in range(5)} == {21}


def test_the_critics_average_follows_it_with_its_own_decay_and_is_kept(teacher: Path):
    stage = build_self_forcing(teacher, critic_ema_decay=0.05, critic_warmup_steps=100)
    expected = snapshot(stage.engine.fake_average)
    assert torch.equal(expected, snapshot(stage.engine.fake_score))
    for step in range(3):
        stage.train_step(step)
        expected = 0.05 * expected + 0.95 * snapshot(stage.engine.fake_score)
        torch.testing.assert_close(snapshot(stage.engine.fake_average), expected)
    assert not torch.equal(expected, snapshot(stage.engine.fake_score))
    fresh = build_self_forcing(teacher, critic_ema_decay=0.05)
    fresh.load_state_dict(stage.state_dict(), "here")
    assert torch.equal(snapshot(fresh.engine.fake_average), snapshot(stage.engine.fake_average))
    newest = build_self_forcing(teacher, critic_ema_decay=0.0, critic_warmup_steps=100)
    newest.train_step(0)
    assert torch.equal(snapshot(newest.engine.fake_average), snapshot(newest.engine.fake_score))
