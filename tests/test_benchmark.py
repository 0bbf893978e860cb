"""What benchmark.py compares is the same work: with and without the cache the videos are equal."""

import pytest
import torch
from conftest import build_small_model
from torch.testing import assert_close

from benchmark import main, sample_without_cache, time_in_turns
from checkpoint import LoadedNetworks
from config import Config, SelfForcingConfig
from rollout import RolloutPlan
from runtime import Runtime
from sampling import sample_few_step
from text_encoder import TextEncoder, TextEncoderConfig


def test_the_rollout_without_cache_makes_the_same_videos():
    torch.manual_seed(0)
    text_encoder = TextEncoder(TextEncoderConfig(width=32, max_tokens=12)).eval()
    networks = LoadedNetworks(build_small_model(), text_encoder, Config(training=SelfForcingConfig()), 0, {})
    plan, runtime = RolloutPlan((1.0, 0.75, 0.5), 3), Runtime(torch.device("cpu"), torch.float32)
    common = (["a 3 moving up", "the digit 5"], [1, 2], 9, plan, runtime)
    with_cache = sample_few_step(networks.generator, text_encoder, *common)
    assert_close(sample_without_cache(networks, *common), with_cache, atol=1e-4, rtol=1e-4)


def test_samplers_take_turns_and_the_warm_up_does_not_count():
    calls: list[str] = []
    seconds = time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b"] * 3 and set(seconds) == {"a", "b"} and min(seconds.values()) >= 0


def test_a_missing_student_is_one_line(tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["--student", str(tmp_path / "absent.pt")])
    assert str(caught.value).startswith("error: no checkpoint at") and "\n" not in str(caught.value)
