"""Losses that use data: their weights, the times they sample and that they can be lowered."""

from dataclasses import dataclass, field

import pytest
import torch
from helpers.networks import batch_random
from torch import Tensor

from method.flow_matching import add_noise, shift_time
from method.losses import x_0_prediction_loss
from method.settings import PretrainConfig
from network.text_encoder import NULL_PROMPT
from training.objectives import bidirectional_loss, block_causal_loss, drop_prompts, sample_block_times, teacher_forcing_loss


def pretrain_config(**changes: object) -> PretrainConfig:
    """Blocks of 2 frames, and a loss that weighs all times by 1 / t^2."""
    lengths = {"num_frames_per_block": 2, "min_num_frames": 6, "max_num_frames": 6}
    return PretrainConfig(**{**lengths, "time_shift": 3.0, "loss_time_floor": 1e-6, **changes})


@dataclass
class OracleModel:
    """Knows x_0: off by one from the true velocity where t > 0, far off where t = 0. Keeps what it was asked."""

    x_0: Tensor
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    cleans: list[Tensor] = field(default_factory=list)

    def forward_bidirectional(self, x_t: Tensor, t: Tensor, prompt: None) -> Tensor:
        self.calls.append((x_t, t))
        time = t[:, :, None, None, None]
        return torch.where(time > 0, (x_t - self.x_0) / time.clamp(min=1e-12) + 1, 100.0)

    def forward_block_causal(self, x_t: Tensor, t: Tensor, prompt: None, block: int, *rest: object) -> Tensor:
        self.blocks.append(block)
        return self.forward_bidirectional(x_t, t, prompt)

    def forward_teacher_forced(self, x_t: Tensor, t: Tensor, x_clean: Tensor, prompt: None, block: int, *rest: object) -> Tensor:
        self.cleans.append(x_clean)
        return self.forward_block_causal(x_t, t, prompt, block)


@pytest.fixture
def videos() -> tuple[Tensor, Tensor]:
    """x_0 and eps (3, 6, 1, 4, 4) in float64."""
    random = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 3, 6, 1, 4, 4, generator=random, dtype=torch.float64)
    return x_0, eps


def test_above_the_floor_the_loss_is_flow_matching(videos):
    x_0, eps = videos
    t = torch.linspace(0.05, 1, 18, dtype=torch.float64).reshape(3, 6)
    v = eps - x_0 + torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = x_0_prediction_loss(v, add_noise(x_0, eps, t), x_0, t, time_floor=0.05)
    torch.testing.assert_close(loss, (v - (eps - x_0)).square().mean())


def test_below_the_floor_the_weight_stops_growing(videos):
    x_0, _ = videos
    for time in (0.0, 1e-6, 0.02, 0.05):
        t = torch.full((3, 6), time, dtype=torch.float64)
        x_t = x_0 + 1  # an error of 1 in x_0_hat, whatever t is
        loss = x_0_prediction_loss(torch.zeros_like(x_0), x_t, x_0, t, time_floor=0.05)
        torch.testing.assert_close(loss, torch.tensor(1 / 0.05**2, dtype=torch.float64))


def test_frame_weights_choose_the_frames_that_count(videos):
    x_0, eps = videos
    t = torch.full((3, 6), 0.5, dtype=torch.float64)
    error = torch.arange(18, dtype=torch.float64).reshape(3, 6)
    v = eps - x_0 + error[:, :, None, None, None]
    weight = torch.zeros(3, 6, dtype=torch.float64)
    weight[0, 2] = weight[2, 5] = 1
    x_t = add_noise(x_0, eps, t)
    loss = x_0_prediction_loss(v, x_t, x_0, t, 0.05, weight)
    torch.testing.assert_close(loss, torch.tensor((2.0**2 + 17.0**2) / 2, dtype=torch.float64))
    everything = x_0_prediction_loss(v, x_t, x_0, t, 0.05, torch.ones_like(weight))
    torch.testing.assert_close(everything, x_0_prediction_loss(v, x_t, x_0, t, 0.05))
    assert x_0_prediction_loss(v, x_t, x_0, t, 0.05, torch.zeros_like(weight)) == 0


def test_bidirectional_loss_gives_one_time_to_a_video(videos):
    model = OracleModel(videos[0].float())
    random = batch_random()
    losses = [bidirectional_loss(model, model.x_0, None, pretrain_config(), random) for _ in range(4)]
    torch.testing.assert_close(torch.stack(losses), torch.ones(4), rtol=1e-3, atol=1e-3)
    times = torch.cat([t for _, t in model.calls])  # (12, F)
    assert (times == times[:, :1]).all() and times[:, 0].unique().numel() == 12 and model.blocks == []


@pytest.mark.parametrize(("num_frames_per_block", "probability"), [(1, 0.5), (3, 0.25), (3, 1.0), (3, 0.0)])
def test_clean_prefixes_have_time_zero_weight_zero_and_their_share(num_frames_per_block, probability):
    count, num_blocks = 8000, 4
    config = PretrainConfig(num_frames_per_block=num_frames_per_block)
    random = torch.Generator().manual_seed(0)
    t, weight = sample_block_times(config, count, num_blocks * num_frames_per_block, probability, random)
    assert t.shape == weight.shape == (count, num_blocks * num_frames_per_block)
    of_block = t.unflatten(1, (num_blocks, num_frames_per_block))
    assert (of_block == of_block[..., :1]).all()
    block_weight = weight.unflatten(1, (num_blocks, num_frames_per_block))[..., 0]  # (count, K)
    assert torch.equal(block_weight == 0, of_block[..., 0] == 0)
    assert (block_weight.diff(dim=1) >= 0).all() and (block_weight[:, -1] == 1).all()  # a prefix, never the whole video
    length = (1 - block_weight).sum(1)
    for blocks in range(1, num_blocks):  # 0..K-1 alike; a length of 0 cannot be told from no prefix
        assert abs((length == blocks).float().mean().item() - probability / num_blocks) < 0.025
    noisy = of_block[..., 0][block_weight == 1]
    median = shift_time(torch.tensor(0.5), 3.0)
    assert abs((noisy < median).float().mean().item() - 0.5) < 0.02
    assert of_block[block_weight.all(1)][:, :, 0].std(dim=1).min() > 0  # each block draws its own


def test_block_causal_loss_shows_a_clean_prefix_and_does_not_count_it(videos):
    x_0 = videos[0].float().repeat(8, 1, 1, 1, 1)
    model = OracleModel(x_0)
    loss = block_causal_loss(model, x_0, None, pretrain_config(clean_prefix_probability=1.0), batch_random())
    (x_t, t), = model.calls
    is_clean = t == 0
    assert 0.1 < is_clean.float().mean() < 0.6 and model.blocks == [2]
    assert torch.equal(x_t[is_clean], x_0[is_clean]) and not torch.isclose(x_t[~is_clean], x_0[~is_clean]).all(dim=(1, 2, 3)).any()
    torch.testing.assert_close(loss, torch.tensor(1.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_clean_prefixes_is_what_was_before_and_the_video_begins_behind_it(monkeypatch, share):
    shown = []  # x_t, x_0, t, as the loss gets them

    def record_loss(v: Tensor, *arguments: Tensor) -> Tensor:
        shown.extend(arguments[:3])
        return v.mean()

    monkeypatch.setattr("training.objectives.x_0_prediction_loss", record_loss)
    x_0 = torch.arange(1, 7.0).reshape(1, 6, 1, 1, 1).repeat(400, 1, 1, 1, 1)  # frames 1 to 6, after -5 to 0
    config = pretrain_config(clean_prefix_probability=1.0, switch_probability=share)
    block_causal_loss(OracleModel(x_0), x_0, None, config, batch_random(), x_before=x_0 - 6)
    x_t, target, t = (each.flatten(1) for each in shown)
    prefix = (t == 0).sum(1)  # frames
    assert set(prefix.tolist()) == {0, 2, 4}
    switched = (prefix > 0) & (x_t[:, 0] < 1)
    assert abs(switched.float().sum() / (prefix > 0).sum() - share) < 0.1
    torch.testing.assert_close(target, torch.arange(1, 7.0) - (prefix * switched)[:, None])
    assert torch.equal(x_t[t == 0], target[t == 0])


def test_teacher_forcing_noises_every_block_and_shows_the_clean_past(videos):
    x_0 = videos[0].float().repeat(8, 1, 1, 1, 1)
    model = OracleModel(x_0)
    loss = teacher_forcing_loss(model, x_0, None, pretrain_config(), batch_random())
    (x_t, t), = model.calls
    (x_clean,) = model.cleans
    assert torch.equal(x_clean, x_0) and model.blocks == [2]
    of_block = t.unflatten(1, (3, 2))
    assert (t > 0).all() and (of_block == of_block[..., :1]).all() and of_block[..., 0].std(dim=1).min() > 0
    assert not torch.isclose(x_t, x_0).all(dim=(2, 3, 4)).any()
    torch.testing.assert_close(loss, torch.tensor(1.0), rtol=1e-3, atol=1e-3)  # every frame counts, none by the oracle's 100


def test_prompts_are_dropped_with_the_probability():
    prompts = [f"a {i}" for i in range(5000)]
    kept = drop_prompts(prompts, 0.2, batch_random())
    assert abs(kept.count(NULL_PROMPT) / 5000 - 0.2) < 0.025
    assert all(now in (NULL_PROMPT, before) for now, before in zip(kept, prompts, strict=True))
    assert kept == drop_prompts(prompts, 0.2, batch_random())
    assert drop_prompts(prompts, 0.0, batch_random()) == prompts
    assert set(drop_prompts(prompts, 1.0, batch_random())) == {NULL_PROMPT}
