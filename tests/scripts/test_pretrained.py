"""The networks that ship: small, loadable, and able to do what the README says of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.compose import composed

from dynamic_video_sf import SelfForcingEngine
from judging.metrics import facts_of_prompts, load_judge, score_videos, summarise
from machine.paths import PRETRAINED
from machine.runtime import Runtime
from moving_mnist import MovingMNISTGenerator
from network.text_encoder import NULL_PROMPT
from sampling.samplers import SamplerSettings, generate
from training.checkpoint import load_networks

RUNTIME = Runtime(torch.device("cpu"), torch.float32)


def score(name: str, settings: SamplerSettings, num_videos: int) -> dict[str, object]:
    networks = load_networks(PRETRAINED / name, RUNTIME.device)
    dataset = networks.config.dataset
    prompts = MovingMNISTGenerator(dataset, "test").captions(987_654_321, range(num_videos))
    video = generate(networks, prompts, list(range(num_videos)), 21, settings, RUNTIME, batch_size=16)
    return summarise(score_videos(load_judge(), video, *facts_of_prompts(prompts), dataset))


def test_the_student_makes_what_the_prompts_ask_in_four_steps_and_in_strokes_as_bold_as_real_ones():
    student = score("student.pt", SamplerSettings(), 40)
    assert student["frames_right"] > 0.87 and student["videos_right"] > 0.85 and student["one_class"] > 0.6  # .953, .963, .805 on 512
    assert student["track_within_1px"] > 0.8 and student["direction_obeyed"] > 0.8  # .963, .947
    assert 0.9 < student["stroke_mass_ratio"] < 1.12  # 1.02


def test_the_students_start_needs_guidance_in_the_same_steps():
    unguided = score("teacher.pt", SamplerSettings(denoising_steps=(1000, 750, 500, 250)), 24)
    guided = score("teacher.pt", SamplerSettings(num_steps=4, causal=True), 24)
    assert unguided["frames_right"] < 0.7 < 0.8 < guided["frames_right"]


@torch.no_grad()
def test_guidance_of_the_default_run_leaves_the_ink_of_real_videos_as_it_is():
    """At every noise level of the scores; a generator that draws as real digits is pushed neither bolder nor fainter."""
    config = composed()
    teacher = load_networks(PRETRAINED / "teacher.pt", RUNTIME.device)
    data = MovingMNISTGenerator(config.dataset, "test")
    video, captions = data.sample(987_654_321, range(32), 9).video, data.captions(987_654_321, range(32))
    text, null_text = (teacher.text_encoder.encode(prompts) for prompts in (captions, [NULL_PROMPT] * 32))

    def ink_by_guidance(t: float, **changes: Any) -> float:
        settings = {"noise_draws": 1, "min_score_time": t, "max_score_time": t + 1e-4} | changes
        engine = SelfForcingEngine(replace(config.training, **settings), teacher.generator, torch.Generator().manual_seed(0))
        unguided, guided, _ = engine._denoised(video, text, null_text)  # the critic is the teacher yet
        return ((guided + 1).sum() / (unguided + 1).sum()).item()

    for t in (0.35, 0.5, 0.65, 0.8, 0.95):
        assert ink_by_guidance(t) == pytest.approx(1, abs=0.05), t
    assert ink_by_guidance(0.9, guidance_ink_kept=1.0) > 1.2 and ink_by_guidance(0.9, clamp_scores=False) < 0.85


@pytest.mark.slow
def test_the_teacher_makes_what_the_prompts_ask_in_many_steps():
    figures = score("teacher.pt", SamplerSettings(num_steps=25), 32)
    assert figures["frames_right"] > 0.95 and figures["videos_right"] > 0.95 and figures["one_class"] > 0.8
    assert figures["track_within_1px"] > 0.75 and figures["direction_obeyed"] > 0.85 and 0.85 < figures["stroke_mass_ratio"] < 1.15
