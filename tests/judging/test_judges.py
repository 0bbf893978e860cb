"""The judges: right on held-out videos whatever the place, the batch and the length, and their files sound or refused."""

import pytest
import torch

from judging import metrics, video_judge
from judging.digit_judge import (
    JUDGE_PATH,
    DigitJudge,
    load_network,
    measure_classes,
    read_videos,
    render_in_places,
    save_network,
    share_read_right,
    train_judge,
)
from judging.video_judge import VIDEO_JUDGE_PATH, VideoJudge, answered_right, read_real_videos, train_video_judge
from moving_mnist import DatasetConfig, MovingMNISTGenerator

CONFIG = DatasetConfig()
PATHS = {DigitJudge: JUDGE_PATH, VideoJudge: VIDEO_JUDGE_PATH}


@pytest.fixture(scope="module")
def video_network() -> VideoJudge:
    return load_network(VideoJudge, VIDEO_JUDGE_PATH)


def test_shipped_ones_are_small_and_right_on_held_out_videos(judge, video_network, batch, readings):
    assert all(path.stat().st_size < 1_000_000 for path in PATHS.values())
    assert judge.config.accuracy >= 0.975 and (readings.probabilities.argmax(dim=-1) == batch.digits).float().mean() >= 0.97
    video_network.check_matches(judge)
    right = answered_right(video_network, *read_real_videos(judge, MovingMNISTGenerator(CONFIG, "test"), 8, 96, 21))
    assert right["digit"] > 0.9 and right["direction"] > 0.9 and right["speed"] > 0.6
    assert right == pytest.approx(video_network.config.accuracy, abs=0.1)


def test_stored_accuracy_is_true(judge):
    held_out = MovingMNISTGenerator(CONFIG, "test")
    frames = render_in_places(held_out, torch.Generator().manual_seed(9))
    assert share_read_right(judge, frames, held_out.digit_set.labels[:, None]) == pytest.approx(judge.config.accuracy, abs=0.005)


def test_class_mass_is_that_of_the_digits_that_it_learned_from(judge):
    generator, again = MovingMNISTGenerator(CONFIG, "judge"), DigitJudge(judge.config)
    mass = torch.stack([generator.sprites[generator.digit_set.labels == digit].mean(dim=0).sum() for digit in range(10)])
    torch.testing.assert_close(judge.class_mass, mass, rtol=1e-3, atol=0)
    measure_classes(again, generator)
    torch.testing.assert_close(judge.class_sharpness, again.class_sharpness, rtol=1e-3, atol=0)


def test_judge_does_not_see_where_the_digit_is(judge, batch):
    frames = torch.full((3, 1, 64, 64), -1.0)
    for frame, row, column in zip(frames, (0, 32, 7), (0, 32, 21), strict=True):
        frame[..., row : row + 32, column : column + 32] = batch.video[0, 0]
    logits = judge(frames)
    torch.testing.assert_close(logits, logits[:1].expand(3, -1))


def test_what_is_read_and_felt_is_of_the_video_alone_and_of_any_length(judge, video_network, batch, readings):
    torch.testing.assert_close(readings.probabilities.sum(dim=-1), torch.ones(96, 21))
    torch.testing.assert_close(read_videos(judge, batch.video[2:3]).probabilities[0], readings.probabilities[2], atol=1e-5, rtol=1e-4)
    together = video_network.embed(readings)
    assert together.shape == (96, video_network.config.embedding)
    torch.testing.assert_close(video_network.embed(readings.take(slice(5, 7))), together[5:7], atol=1e-5, rtol=1e-4)
    blank = read_videos(judge, torch.full((2, 6, 1, 32, 32), -1.0))
    assert all(video_network.embed(other).isfinite().all() for other in (readings.take(frames=slice(3)), blank))


def test_every_frame_and_their_order_count(video_network, readings):
    together = video_network.embed(readings)
    for frames in (torch.arange(21).flip(0), torch.cat((torch.arange(20), torch.tensor([0]))), torch.zeros(21, dtype=torch.long)):
        other = video_network.embed(readings.take(frames=frames))
        assert ((other - together).norm(dim=1) > 0.02 * together.norm(dim=1)).float().mean() > 0.9


def test_training_makes_a_judge_that_can_be_kept(tmp_path):
    config = DatasetConfig(frame_size=24, digit_size=10)
    trained = train_judge(config, num_steps=40, seed=0)
    assert 0.15 < trained.config.accuracy < 1 and not trained.training  # 0.1 is chance
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    save_network(trained, tmp_path / "judge.pt")
    load_network(DigitJudge, tmp_path / "judge.pt").check_matches(config)


def test_training_makes_a_video_judge_that_can_be_kept(judge, tmp_path):
    trained = train_video_judge(judge, CONFIG, num_steps=60, num_videos=128, seed=0, num_frames=9)
    readings, right = read_real_videos(judge, MovingMNISTGenerator(CONFIG, "train"), 0, 128, 9)
    assert answered_right(trained, readings, right)["digit"] > 0.6 and set(trained.config.accuracy) == {"digit", "direction", "speed"}
    save_network(trained, tmp_path / "judge.pt")
    again = load_network(VideoJudge, tmp_path / "judge.pt")
    torch.testing.assert_close(again.embed(readings), trained.embed(readings), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", PATHS)
def test_files_are_whole_and_sound_or_refused(kind, tmp_path):
    network, path = load_network(kind, PATHS[kind]), tmp_path / "folder" / "network.pt"
    with pytest.raises(FileNotFoundError, match=f"no {kind.title} at .*: make one with `{kind.command} --output"):
        load_network(kind, path)
    save_network(network, path)
    again = load_network(kind, path)
    assert again.config == network.config and not again.training and [file.name for file in path.parent.iterdir()] == ["network.pt"]
    torch.testing.assert_close(again.state_dict(), network.state_dict(), atol=0, rtol=0)  # it was float16 before
    stored = torch.load(path, weights_only=True)
    del stored[kind.weights][next(iter(network.state_dict()))]
    for content in (stored, {"state": 1}, b"no judge"):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=f"not a sound {kind.title}"):
            load_network(kind, path)


@pytest.mark.parametrize(("room", "arguments", "words"), [
    (metrics, ["--train_judge"], "judge.pt exists already: give --output"),
    (metrics, ["--output", "none.pt"], "no judge at none.pt: make one with"),
    (metrics, ["--train_judge", "--output", "new.pt", "--steps", "0"], "--steps is 0: expected at least 1"),
    (video_judge, ["--train"], "video_judge.pt exists already: give --output"),
    (video_judge, ["--output", "none.pt"], "no video judge at none.pt: make one with"),
    (video_judge, ["--train", "--output", "new.pt", "--steps", "0"], "--steps is 0: expected at least 1"),
    (video_judge, ["--train", "--output", "new.pt", "--videos", "63"], "--videos is 63: expected at least 64"),
])
def test_the_command_line_refuses_in_one_line_and_overwrites_nothing(room, arguments, words, refusal, tmp_path, monkeypatch):
    before = [path.read_bytes() for path in PATHS.values()]
    monkeypatch.chdir(tmp_path)
    assert words in refusal(room.main, *arguments)
    assert [path.read_bytes() for path in PATHS.values()] == before and not list(tmp_path.iterdir())


def test_a_judge_that_reads_badly_fails_the_self_test_in_one_line(judge, refusal, tmp_path):
    network = DigitJudge(judge.config)
    save_network(network, tmp_path / "judge.pt")
    assert " on " in refusal(metrics.main, "--output", str(tmp_path / "judge.pt"))
