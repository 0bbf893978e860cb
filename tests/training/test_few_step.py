"""Few-step starts: trajectories equal the samplers, regression meets every step once, consistency on a known ODE."""

from dataclasses import dataclass

import pytest
import torch
from helpers.networks import batch_random, build_small_model, random_prompt
from torch import Tensor

from dynamic_video_sf import make_noise_streams, rollout_blocks, sample_bidirectional
from method.flow_matching import euler_sampler, sampling_times, shift_time
from method.plans import BidirectionalPlan, many_step_plan
from method.settings import CausalConsistencyConfig, CausalODEConfig
from training.few_step import Trajectory, consistency_loss, nearest_steps, ode_regression_loss, ode_trajectory

STEPS, KEPT, SHIFT, GUIDANCE, BLOCK = 4, [0, 1, 3], 3.0, 2.0, 3
NO_PROMPTS = (None, None, (None, None))
TEACHERS = pytest.mark.parametrize("kind", ["causal", "bidirectional"])


def ode_config(kind: str) -> CausalODEConfig:
    return CausalODEConfig(trajectory_teacher=kind, trajectory_steps=STEPS, denoising_steps=[1000, 750, 250], guidance=GUIDANCE)


def small_trajectory(kind: str) -> Trajectory:
    model = build_small_model()
    prompts = random_prompt(model, 2), random_prompt(model, 2, seed=9)
    return ode_trajectory(model, *prompts, make_noise_streams([1, 2]), 9, ode_config(kind))


def sampled(kind: str) -> Tensor:
    """The same video from the samplers themselves."""
    model = build_small_model()
    prompt, null = random_prompt(model, 2), random_prompt(model, 2, seed=9)
    if kind == "causal":
        plan = many_step_plan(STEPS, SHIFT, BLOCK, GUIDANCE)
        return torch.cat(list(rollout_blocks(model, prompt, make_noise_streams([1, 2]), 3, plan, null)), dim=1)
    return sample_bidirectional(model, prompt, null, make_noise_streams([1, 2]), 9, BidirectionalPlan(STEPS, SHIFT, GUIDANCE))


def test_a_trajectory_meets_the_denoising_steps_unless_its_steps_are_too_many():
    times = (1.0, 0.9, 0.75, 0.5)
    assert nearest_steps(24, SHIFT, times) == [0, 6, 12, 18]
    assert torch.equal(sampling_times(24, SHIFT), shift_time(torch.linspace(1, 0, 25), SHIFT))
    fine = sampling_times(1000, SHIFT)[nearest_steps(1000, SHIFT, times)]
    torch.testing.assert_close(fine, torch.tensor(times), rtol=0, atol=1e-3)


@TEACHERS
def test_trajectories_end_where_the_sampler_ends_and_keep_the_points_between(kind):
    trajectory, is_causal = small_trajectory(kind), kind == "causal"
    with torch.no_grad():
        assert torch.equal(trajectory.x_0, sampled(kind))
    num_ends = 0 if is_causal else 1  # the original is trained at time 0 too, at which inference writes the cache
    assert trajectory.x_t.shape == (3 + num_ends, 2, 9, 1, 8, 8) and not trajectory.x_t.requires_grad
    torch.testing.assert_close(trajectory.times, torch.cat([sampling_times(STEPS, SHIFT)[KEPT], torch.zeros(num_ends)]))
    assert is_causal or torch.equal(trajectory.x_t[-1], trajectory.x_0)
    assert trajectory.x_t[0].std().item() == pytest.approx(1, abs=0.1)  # at t = 1 it is the noise
    # Euler's last step is straight: from x_t at the last time, the velocity leads to x_0 exactly.
    model, t = build_small_model(), trajectory.times[2].expand(2, 9)
    prompt, null = random_prompt(model, 2), random_prompt(model, 2, seed=9)

    def velocity(context, x_t: Tensor) -> Tensor:
        if is_causal:
            return model.forward_teacher_forced(x_t, t, trajectory.x_0, context, BLOCK)
        return model.forward_bidirectional(x_t, t, context)

    with torch.no_grad():
        x_t = trajectory.x_t[2]
        cond, uncond = velocity(prompt, x_t), velocity(null, x_t)
    ended = x_t - t[..., None, None, None] * (uncond + GUIDANCE * (cond - uncond))
    torch.testing.assert_close(ended, trajectory.x_0, rtol=1e-4, atol=1e-4 * trajectory.x_0.abs().max().item())


@dataclass
class Recorder:
    """Predicts `answer` for x_0, whatever it is asked, and keeps the question."""

    answer: Tensor

    def forward_teacher_forced(self, x_t: Tensor, t: Tensor, x_clean: Tensor | None, *rest: object) -> Tensor:
        self.asked = x_t, t, x_clean
        return (x_t - self.answer) / t[..., None, None, None]

    def forward_block_causal(self, x_t: Tensor, t: Tensor, *rest: object) -> Tensor:
        return self.forward_teacher_forced(x_t, t, None)


@TEACHERS
def test_regression_puts_each_block_at_its_step_and_asks_for_the_end(kind):
    trajectory, steps, config = small_trajectory(kind), torch.tensor([[0, 1, 2], [2, 2, 0]]), ode_config(kind)
    student = Recorder(trajectory.x_0)
    assert ode_regression_loss(student, trajectory, steps, None, config).item() < 1e-9
    x_t, t, x_clean = student.asked
    assert x_clean is (trajectory.x_0 if kind == "causal" else None)
    for video in range(2):
        for block, step in enumerate(steps[video].tolist()):
            frames = slice(BLOCK * block, BLOCK * (block + 1))
            assert torch.equal(x_t[video, frames], trajectory.x_t[step, video, frames])
            assert (t[video, frames] == trajectory.times[step]).all()
    off = ode_regression_loss(Recorder(trajectory.x_0 + 0.5), trajectory, steps, None, config)
    assert off.item() == pytest.approx(0.25, rel=1e-3)


def test_a_block_at_time_0_is_context_alone():
    """It adds no loss, whatever the network says of it, and what the others learn depends on its content."""
    trajectory, model = small_trajectory("bidirectional"), build_small_model()
    prompt = random_prompt(model, 2)

    def loss(*steps: int) -> Tensor:
        return ode_regression_loss(model, trajectory, torch.tensor([steps] * 2), prompt, ode_config("bidirectional"))

    with torch.no_grad():
        assert loss(3, 3, 3) == 0 and loss(3, 1, 1) != loss(0, 1, 1)


class LinearTeacher:
    """v = rate x: Euler's method from x at times[i] ends at x prod (1 + (t_{j+1} - t_j) rate), j from i on."""

    def __init__(self, rate: float):
        self.rate = rate
        self.clean: list[Tensor] = []

    def forward_teacher_forced(self, x_t: Tensor, t: Tensor, x_clean: Tensor, *rest: object) -> Tensor:
        self.clean.append(x_clean)
        return self.rate * x_t


class ConsistentStudent:
    """The consistency function of Euler's method on that ODE, or with `error` one that is off by it, as a velocity."""

    def __init__(self, rate: float, times: Tensor, error: float = 0.0):
        factors = 1 + times.diff() * rate
        self.times = times
        self.factor = torch.cat([factors.flip(0).cumprod(0).flip(0), torch.ones(1)])  # at times[i]: all steps from there
        self.error = error
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward_teacher_forced(self, x_t: Tensor, t: Tensor, x_clean: Tensor, *rest: object) -> Tensor:
        self.seen.append((t, x_clean))
        index = (t[..., None] - self.times).abs().argmin(-1)
        factor, time = self.factor[index][..., None, None, None], t[..., None, None, None]
        answer = factor * x_t + self.error * time
        return torch.where(time > 0, (x_t - answer) / time.clamp(min=1e-9), 77.0)  # at t = 0 the velocity must not count


def test_consistency_loss_is_zero_for_the_consistency_function_and_for_no_other():
    config = CausalConsistencyConfig(consistency_steps=6)
    times, x_0 = sampling_times(6, SHIFT), torch.randn(4, 9, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def loss(error: float = 0.0, rate: float = 0.8, seed: int = 0) -> float:
        student, teacher = ConsistentStudent(0.8, times, error), LinearTeacher(rate)
        value = consistency_loss(student, student, teacher, x_0, *NO_PROMPTS, config, batch_random(seed))
        assert all(clean is x_0 for _, clean in student.seen) and all(clean is x_0 for clean in teacher.clean)
        return value.item()

    ends = euler_sampler(lambda x, t: 0.8 * x, x_0, times)
    torch.testing.assert_close(ends, ConsistentStudent(0.8, times).factor[0] * x_0)  # the oracle is right
    assert max(loss(seed=seed) for seed in range(5)) < 1e-9
    assert loss(error=0.3) > 1e-4 and loss(rate=-0.8) > 1e-4


def test_consistency_draws_neighbours_for_every_block_down_to_time_zero():
    config, times, x_0 = CausalConsistencyConfig(consistency_steps=3), sampling_times(3, SHIFT), torch.zeros(64, 9, 1, 1, 1)
    student = ConsistentStudent(0.8, times)
    consistency_loss(student, student, LinearTeacher(0.8), x_0, *NO_PROMPTS, config, batch_random())
    (s, _), (t, _) = student.seen
    pairs = set(zip(t.flatten().tolist(), s.flatten().tolist(), strict=True))
    assert pairs == set(zip(times[:-1].tolist(), times[1:].tolist(), strict=True))
    of_block = t.unflatten(1, (3, 3))
    assert (of_block == of_block[..., :1]).all() and of_block.std(dim=1).max() > 0


def test_consistency_gradient_reaches_the_student_alone():
    student, target, teacher = (build_small_model(seed) for seed in range(3))
    for model in (target, teacher):
        model.requires_grad_(True)
    prompts = random_prompt(student, 2), random_prompt(target, 2), (random_prompt(teacher, 2), random_prompt(teacher, 2, seed=9))
    x_0 = torch.randn(2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    consistency_loss(student, target, teacher, x_0, *prompts, CausalConsistencyConfig(consistency_steps=4), batch_random()).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for model in (target, teacher) for parameter in model.parameters())
