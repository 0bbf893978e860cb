"""Long video: what the figures say of paths and readings that are known."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.networks import save_untrained

from experiments import long_video
from experiments.long_video import SWITCHES, main, read_rows, summarise_switch
from machine.paths import REPOSITORY
from moving_mnist import DatasetConfig, MovingMNISTGenerator
from tiny_causal_wan import ModelConfig
from training.config import Config, PretrainConfig, SelfForcingConfig, TrainingConfig

NUM_BEFORE = 21


def test_a_switch_is_shown_when_nine_in_ten_read_it_and_smooth_where_the_track_goes_on():
    config = DatasetConfig()
    generator = MovingMNISTGenerator(config, "test")
    centres = generator.sample(0, range(20), 30).track[:, :, 0]  # real tracks, bounces included
    classes = torch.full((20, 30), 3)
    classes[:17, 24:], classes[17:, 26:] = 7, 7  # 85 % from the third frame on, all from the fifth
    digits = torch.full((20,), 3), torch.full((20,), 7)
    found = summarise_switch(classes, centres, digits, NUM_BEFORE, config)
    assert found["frames_until_shown"] == 5 and found["old_before"] == found["share_of_new_at_end"] == 1
    assert found["path_error_median"] < 0.5 and found["path_error_smooth_share"] > 0.9
    jumped = centres.clone()
    jumped[:, NUM_BEFORE:] += torch.tensor([6.0, 0.0])
    found = summarise_switch(classes, jumped, digits, NUM_BEFORE, config)
    assert found["path_error_median"] == pytest.approx(6, abs=1) and found["path_error_smooth_share"] < 0.1
    assert found["path_error_without_median"] < 0.5  # nothing had changed there yet
    assert summarise_switch(torch.full((20, 30), 3), centres, digits, NUM_BEFORE, config)["frames_until_shown"] is None


def untrained(path: Path, training: TrainingConfig) -> list[str]:
    model = ModelConfig(width=24, num_layers=1, num_heads=2)
    return ["--checkpoint", str(save_untrained(path / "network.pt", Config(model=model, training=training))), "--output_dir", str(path)]


@pytest.mark.parametrize("objective", ["teacher_forcing", "diffusion_forcing"])
def test_drift_of_a_network_that_is_no_student_in_many_guided_steps_with_the_rolling_window(tmp_path: Path, objective: str):
    network = untrained(tmp_path, PretrainConfig(objective=objective, guidance=1.5, teacher_steps=4))
    drift = ["drift", "--num_frames", "42", "--batch_size", "1", *network]
    main([*drift, "--num_steps", "2", "--guidance", "3", "--window_frames", "9", "--sink_frames", "3", "--name", "asked"])
    main([*drift, "--name", "own"])
    main([*drift, "--denoising_steps", "1000", "500", "250", "--name", "naive"])
    rows = json.loads((tmp_path / "drift.json").read_text())
    keys = ("num_steps", "guidance", "window_frames", "sink_frames")
    assert {name: tuple(row[key] for key in keys) for name, row in rows.items()} == {
        "asked": (2, 3.0, 9, 3), "own": (4, 1.5, 21, 0), "naive": (3, 1.0, 21, 0)
    }
    assert all(row["num_frames"] == 42 and len(row["segments"]) == 1 for row in rows.values())


@pytest.mark.parametrize("command", [
    ["drift", "--num_frames", "42"], ["switch", "--num_streams", "2", "--num_before", "6", "--num_after", "3"],
    ["continue", "--num_videos", "2", "--num_frames", "3"],
])
def test_a_bidirectional_teacher_is_measured_block_by_block_in_guided_steps(tmp_path: Path, command: list[str]):
    network = untrained(tmp_path, PretrainConfig(guidance=1.5))
    main([*command, "--batch_size", "2", "--causal", "--num_steps", "2", "--window_frames", "9", *network])
    (row,) = json.loads((tmp_path / f"{command[0]}.json").read_text()).values()
    keys = ("num_steps", "guidance", "window_frames", "evaluations_a_block", "cache_evaluations_a_block")
    assert tuple(row[key] for key in keys) == (2, 1.5, 9, 4, 2)
    assert command[0] != "switch" or set(SWITCHES) <= set(row)
    assert (tmp_path / f"{command[0]}.png").exists() == (command[0] != "continue")


@pytest.mark.parametrize(("options", "words"), [
    (["drift", "--num_frames", "21"], "--num_frames is 21: expected at least 42"),
    (["continue", "--seed", str(2**63)], "--seed is 9223372036854775808: expected 0 to 9223372036854775807"),
    (["switch", "--num_before", "3"], "--num_before is 3: expected at least 4, to fit a track"),
    (["drift", "--output_dir", "file/sub"], "cannot write into the folder file/sub "),
])
def test_a_number_out_of_range_is_refused_before_the_checkpoint_is_read(tmp_path: Path, monkeypatch, options: list[str], words: str):
    monkeypatch.setattr(long_video, "load_networks", never)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit, match=f"^error: {re.escape(words)}"):
        main([options[0], "--output_dir", str(tmp_path), *options[1:]])


@pytest.mark.parametrize(("training", "options", "words"), [
    (PretrainConfig(), [], "makes all frames at once: give --causal to roll it out"),
    (PretrainConfig(), ["--num_steps", "0"], "--num_steps is 0: expected at least 1"),
    (PretrainConfig(), ["--guidance", "-1"], "--guidance is -1.0: expected 0 or more"),
    (PretrainConfig(), ["--num_steps", "4", "--denoising_steps", "1000"], "--denoising_steps .* and --num_steps .* exclude each other"),
    (SelfForcingConfig(window_frames=9, sink_frames=3), ["--sink_frames", "9"], "--sink_frames is 9: expected 0 to 6"),
])
def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path: Path, training: TrainingConfig, options: list[str], words: str):
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        main(["drift", *options, *untrained(tmp_path, training)])


POINT = {"frames_right": 1.0, "stroke_mass_ratio": 1.0, "mean_speed": 1.5, "track_within_1px": 1.0}
ROW = {"first_21": POINT, "segments": [POINT], "segment_frames": 630, "num_frames": 42}


def never(*_, **__):
    raise AssertionError("too late: this was to be refused before")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with the rows of an earlier call."""
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "drift.json").write_text(json.dumps({"network": ROW, "other": ROW}))
    return folder


@pytest.fixture
def drift(tmp_path: Path, results: Path) -> list[str]:
    """The command for a tiny network, which adds to these rows."""
    network = untrained(tmp_path, SelfForcingConfig())
    return ["drift", "--num_frames", "42", "--batch_size", "1", *network, "--output_dir", str(results)]


@pytest.mark.parametrize("held", ["[1, 2]", '{"network": 3}', '{"network": {"continued": {}}}', '{"network": {"first', "\xff"])
def test_a_file_that_holds_no_rows_is_named_before_the_checkpoint_is_read_and_left_as_it_is(results: Path, monkeypatch, held: str):
    monkeypatch.setattr(long_video, "load_networks", never)
    (results / "drift.json").write_bytes(held.encode("latin-1"))
    before, file = contents(results), re.escape(str(results / "drift.json"))
    for more in ([], ["--replace"]):
        with pytest.raises(SystemExit, match=rf"^error: [^\n]*{file}[^\n]*move it away or choose [^\n]*$"):
            main(["drift", "--output_dir", str(results), *more])
    assert contents(results) == before


@pytest.mark.parametrize("command", ["drift", "switch", "continue"])
def test_the_published_rows_can_be_read(command: str):
    assert any(name.startswith("student") for name in read_rows(REPOSITORY / "results" / "long_video" / f"{command}.json", command))


def test_a_row_that_exists_is_refused_before_the_checkpoint_is_read(drift: list[str], results: Path, monkeypatch):
    monkeypatch.setattr(long_video, "load_networks", never)
    before = contents(results)
    for options, name in (([], "network"), (["--name", "other"], "other")):  # by default the checkpoint's
        with pytest.raises(SystemExit, match=rf"^error: .*drift.json has a row '{name}' .* another --name, or .*--replace"):
            main([*drift, *options])
    assert contents(results) == before


def test_replace_puts_the_new_row_in_the_old_ones_place_and_another_name_adds_one(drift: list[str], results: Path, monkeypatch):
    monkeypatch.setattr(long_video, "measure_drift", lambda *_: {**ROW, "new": True})
    main([*drift, "--replace"])
    main([*drift, "--name", "third"])
    rows = json.loads((results / "drift.json").read_text())
    assert [(name, "new" in row) for name, row in rows.items()] == [("network", True), ("other", False), ("third", True)]
    assert set(contents(results)) == {"drift.json", "drift.png"}


def test_rows_that_other_calls_add_meanwhile_stay(drift: list[str], results: Path, monkeypatch, capsys):
    def measure(*_):
        (results / "drift.json").write_text(json.dumps({"late": ROW, "third": ROW}))
        return {**ROW, "new": True}

    monkeypatch.setattr(long_video, "measure_drift", measure)
    main([*drift, "--name", "third"])
    rows = json.loads((results / "drift.json").read_text())
    assert [(name, "new" in row) for name, row in rows.items()] == [("late", False), ("third", False), ("third (2)", True)]
    assert "row 'third (2)'" in capsys.readouterr().out
