"""The video judge: knows digits, direction and speed of held-out videos, reads any length, and its file is sound or refused."""

import pytest
import torch

from judging import video_judge as video_judge_room
from judging.digit_judge import load_judge, read_videos, save_network
from judging.video_judge import (
    VIDEO_JUDGE_PATH,
    answered_right,
    answers,
    embed_videos,
    load_video_judge,
    read_real_videos,
    train_video_judge,
)
from moving_mnist import DatasetConfig, MovingMNISTGenerator

CONFIG = DatasetConfig()


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def video_judge():
    return load_video_judge()


@pytest.fixture(scope="module")
def batch():
    return MovingMNISTGenerator(CONFIG, "test").sample(seed=8, indices=range(96), num_frames=21)


@pytest.fixture(scope="module")
def readings(judge, batch):
    return read_videos(judge, batch.video)


def test_shipped_one_is_small_and_answers_on_held_out_videos(judge, video_judge, batch, readings):
    assert VIDEO_JUDGE_PATH.stat().st_size < 1_000_000
    video_judge.check_matches(judge)
    right = answered_right(video_judge, readings, answers(batch))
    assert right["digit"] > 0.9 and right["direction"] > 0.9 and right["speed"] > 0.6
    for name, share in video_judge.config.accuracy.items():
        assert right[name] == pytest.approx(share, abs=0.1), name


def test_features_are_of_the_video_alone_and_of_any_length(judge, video_judge, readings):
    together = embed_videos(video_judge, readings)
    assert together.shape == (96, video_judge.config.embedding) and together.dtype == torch.float64
    torch.testing.assert_close(embed_videos(video_judge, readings.take(slice(5, 7))), together[5:7], atol=1e-5, rtol=1e-4)
    blank = read_videos(judge, torch.full((2, 6, 1, 32, 32), -1.0))
    for other in (readings.take(frames=slice(3)), blank):
        assert torch.isfinite(embed_videos(video_judge, other)).all()


def test_every_frame_and_their_order_count(video_judge, readings):
    together = embed_videos(video_judge, readings)
    for frames in (torch.arange(21).flip(0), torch.cat((torch.arange(20), torch.tensor([0]))), torch.zeros(21, dtype=torch.long)):
        other = embed_videos(video_judge, readings.take(frames=frames))
        assert ((other - together).norm(dim=1) > 0.02 * together.norm(dim=1)).float().mean() > 0.9


def test_training_learns_and_round_trips(judge, tmp_path):
    trained = train_video_judge(judge, CONFIG, num_steps=60, num_videos=128, seed=0, num_frames=9)
    readings, right = read_real_videos(judge, MovingMNISTGenerator(CONFIG, "train"), 0, 128, 9)
    assert answered_right(trained, readings, right)["digit"] > 0.6 and set(trained.config.accuracy) == {"digit", "direction", "speed"}
    path = tmp_path / "folder" / "video_judge.pt"
    save_network(trained, path)
    again = load_video_judge(path)
    assert again.config == trained.config and not again.training
    assert [file.name for file in path.parent.iterdir()] == ["video_judge.pt"]
    torch.testing.assert_close(embed_videos(again, readings), embed_videos(trained, readings), atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match="steps 0"):
        train_video_judge(judge, CONFIG, num_steps=0, num_videos=128, seed=0)


def test_what_is_no_video_judge_is_refused(tmp_path, video_judge):
    path = tmp_path / "video_judge.pt"
    with pytest.raises(FileNotFoundError, match="judging.video_judge --train"):
        load_video_judge(path)
    save_network(video_judge, path)
    stored = torch.load(path, weights_only=True)
    del stored["video_judge_state_dict"]["mean_mass"]
    for content in (stored, b"nothing"):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match="not a sound video judge"):
            load_video_judge(path)


@pytest.mark.parametrize("arguments, words", [
    (["--train"], "video_judge.pt exists already: give --output"), (["--output", "none.pt"], "no video judge at none.pt: make one with"),
    (["--train", "--output", "TMP/new.pt", "--steps", "0"], "steps"),
])
def test_the_command_line_refuses_in_one_line_and_overwrites_nothing(arguments, words, tmp_path, monkeypatch):
    before = video_judge_room.VIDEO_JUDGE_PATH.read_bytes()
    monkeypatch.setattr("sys.argv", ["video_judge.py", *(argument.replace("TMP", str(tmp_path)) for argument in arguments)])
    with pytest.raises(SystemExit, match=f"^error: .*{words}") as caught:
        video_judge_room.main()
    assert "\n" not in caught.value.code and video_judge_room.VIDEO_JUDGE_PATH.read_bytes() == before and not list(tmp_path.iterdir())
