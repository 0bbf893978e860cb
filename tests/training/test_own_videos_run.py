"""The whole path on one's own videos: pretraining, Self-Forcing, generation, a stream, evaluation; and what does not fit is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import runs

import generate
from clips.own_videos import VideosConfig
from clips.video_files import load_array, load_frames
from evaluate import EvaluateConfig, evaluate
from experiments import long_video, shapes
from judging.clip_panel import CLIP_FIGURES, ClipPanel
from method.settings import PretrainConfig, SelfForcingConfig
from moving_mnist import DatasetConfig
from network.text_encoder import VOCABULARY, TextEncoderConfig
from train import SimplifiedTrainer
from training.checkpoint import CheckpointError, load_checkpoint, load_networks
from training.config import Config, config_from_dict

WORDS = ["a", "blue", "circle", "down", "green", "left", "moving", "red", "right", "square", "triangle", "up", "yellow"]
SHARED = {**runs.SHARED, "num_steps": 2, "max_num_frames": 6, "checkpoint_interval": 1}


def tiny_config(log_dir: Path, folder: Path, training: PretrainConfig | SelfForcingConfig) -> Config:
    config = runs.tiny_config(log_dir, training)
    dataset = VideosConfig(root=str(folder), frame_size=16, test_fraction=0.3)
    return replace(config, model=replace(config.model, channels=3), text=TextEncoderConfig(width=32), dataset=dataset)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "shapes"
    shapes.main(["--output_dir", str(path), "--num_clips", "150", "--num_frames", "6"])
    return path


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory) -> Path:
    config = tiny_config(tmp_path_factory.mktemp("teacher"), folder, PretrainConfig(**SHARED))
    return SimplifiedTrainer(config).train() / "checkpoint_final.pt"


@pytest.fixture(scope="module")
def student_config(folder, teacher, tmp_path_factory) -> Config:
    training = SelfForcingConfig(
        **SHARED, pretrained_checkpoint=str(teacher), denoising_steps=[1000, 500], dfake_gen_update_ratio=1, critic_warmup_steps=0
    )
    return tiny_config(tmp_path_factory.mktemp("student"), folder, training)


@pytest.fixture(scope="module")
def student(student_config) -> Path:
    return SimplifiedTrainer(student_config).train() / "checkpoint_final.pt"


def test_the_checkpoint_holds_the_vocabulary(teacher, student):
    for path in (teacher, student):
        networks = load_networks(path, torch.device("cpu"))
        assert networks.config.text.vocabulary == WORDS == list(networks.text_encoder.vocabulary)
        assert isinstance(networks.config.dataset, VideosConfig) and networks.digits_seen == ("train",)
        assert networks.text_encoder.tokenize(["a red square"])[0, :5].tolist() == [1, 2, 9, 11, 0]
    stored = load_checkpoint(teacher)["config"]
    assert config_from_dict({**stored, "text": {"width": 64}, "dataset": {}}).text.vocabulary is None  # as before there were own videos
    assert len(load_networks(teacher, torch.device("cpu")).text_encoder.token_embedding.weight) == len(WORDS) + 2 < len(VOCABULARY)


def test_prompts_become_videos_and_streams_and_clips_go_on(student, folder, tmp_path, capsys):
    generate.main([
        "--checkpoint", str(student), "--schedule", "0: a red square moving up", "6: a blue circle", "--num_frames", "12",
        "--format", "npz", "--output_dir", str(tmp_path / "stream"), "--device", "cpu", "--precision", "float32",
    ])
    video = load_array(next((tmp_path / "stream").glob("*.npz")))[0]
    assert video.shape == (12, 3, 16, 16) and video[:, 0].ne(video[:, 1]).any()
    capsys.readouterr()
    init = folder / "0000.gif"
    generate.main([
        "--checkpoint", str(student), "--prompts", "a red zebra", "--init", str(init), "--num_frames", "12", "--format", "npz",
        "--output_dir", str(tmp_path / "continued"), "--device", "cpu", "--precision", "float32",
    ])
    assert torch.equal(load_array(next((tmp_path / "continued").glob("*.npz")))[0][:6], load_frames(init, 16, 3))
    assert f"unknown words left out of the prompts: zebra. Known words: {', '.join(WORDS)}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--prompts is not given: expected captions like those of your videos, of words such as a, blue"):
        generate.main(["--checkpoint", str(student), "--output_dir", str(tmp_path)])


def test_evaluation_has_figures_without_digits(teacher, student, folder, tmp_path, capsys):
    config = EvaluateConfig(
        checkpoint=[str(teacher), str(student)], num_videos=40, precision="float32", output_dir=str(tmp_path / "out"),
        videos_root=str(folder.rename(folder.with_name("moved"))),
    )
    try:
        results = evaluate(config)
    finally:
        folder.with_name("moved").rename(folder)
    said = capsys.readouterr().out
    assert "Digit figures are left out: frames right, one class, track, direction, stroke mass, glyphs" in said
    assert list(results)[:3] == ["training clips", "training clips, shuffled", "training clips, stopped"] and len(results) == 5
    for figures in results.values():
        assert CLIP_FIGURES.keys() <= figures.keys() and "frames_right" not in figures
        for key in CLIP_FIGURES:
            low, high = figures[f"{key}_ci"]
            assert low <= figures[key] <= high, key
    imitated, frozen, untrained = results["training clips"], results["training clips, stopped"], list(results.values())[-1]
    assert frozen["motion"] == 0 and 0.7 < imitated["motion"] < 1.4 and 0.6 < imitated["diversity"] < 1.6
    assert imitated["frechet_distance"] < frozen["frechet_distance"] and imitated["frechet_distance"] < untrained["frechet_distance"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json", "per_frame.png", "comparison.png", "comparison.gif"}


def test_one_video_again_and_again_has_no_diversity(folder):
    config = VideosConfig(root=str(folder), frame_size=16, test_fraction=0.3)
    panel = ClipPanel(config, 16, 6)
    assert panel.judge(panel.held_out[:1].expand_as(panel.held_out))["diversity"] == 0
    figures = panel.judge(panel.held_out)
    assert figures["frechet_distance"] < 1e-6 and figures["coverage"] == 1
    assert figures["diversity"] == pytest.approx(1) and figures["motion"] == pytest.approx(1)
    with pytest.raises(ValueError, match="6 of .* held-out and .* training clips in .*: expected at least 7 of each"):
        ClipPanel(config, 6, 6)


def test_networks_of_other_data_or_captions_are_refused(student_config, folder, tmp_path, teacher):
    digits = replace(student_config, dataset=DatasetConfig(frame_size=16, digit_size=8, channels=3))
    with pytest.raises(CheckpointError, match="was trained on one's own videos, and this run is of Moving MNIST"):
        SimplifiedTrainer(digits)
    shapes.main(["--output_dir", str(tmp_path / "others"), "--num_clips", "20", "--num_frames", "6"])
    captions = tmp_path / "others" / "captions.csv"
    captions.write_text(captions.read_text().replace("square", "box"))
    others = replace(student_config, dataset=replace(student_config.dataset, root=str(tmp_path / "others")))
    with pytest.raises(CheckpointError, match="other captions than those of this run, which do not share the words box, square"):
        SimplifiedTrainer(others)
    with pytest.raises(SystemExit, match="one's own videos .*: the measures are for videos of digits"):
        long_video.main(["drift", "--checkpoint", str(teacher), "--causal", "--output_dir", str(tmp_path), "--name", "x"])


def test_clips_without_captions_train_without_prompts(folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in sorted(folder.glob("*.gif"))[:20]:
        (bare / path.name).write_bytes(path.read_bytes())
    path = SimplifiedTrainer(tiny_config(tmp_path / "logs", bare, PretrainConfig(**SHARED))).train() / "checkpoint_final.pt"
    assert load_networks(path, torch.device("cpu")).text_encoder.vocabulary == ()
    generate.main(["--checkpoint", str(path), "--output_dir", str(tmp_path / "out"), "--device", "cpu", "--precision", "float32"])
    assert (tmp_path / "out" / "000_untitled_seed0.gif").is_file()
