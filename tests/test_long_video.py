"""Long video: what the figures say of paths and readings that are known."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from test_evaluate import save_untrained

from config import Config, PretrainConfig, SelfForcingConfig, TrainingConfig
from long_video import SWITCHES, draw_drift, main, summarise_switch
from moving_mnist import DatasetConfig, MovingMNISTGenerator
from tiny_causal_wan import ModelConfig

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


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    ["drift", "--num_frames", "42"], ["switch", "--num_streams", "2", "--num_before", "21", "--num_after", "6"],
    ["continue", "--num_videos", "2", "--num_frames", "6"],
])
def test_every_command_measures_and_adds_a_row(tmp_path: Path, command: list[str]):
    for name in ("one", "other"):
        main([*command, "--batch_size", "2", "--name", name, "--sink_frames", "3", "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / f"{command[0]}.json").read_text())
    assert set(rows) == {"one", "other"} and rows["one"]["sink_frames"] == 3
    assert command[0] != "switch" or set(SWITCHES) <= set(rows["one"])
    assert (tmp_path / f"{command[0]}.png").exists() == (command[0] != "continue")


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


def test_a_plot_of_many_rows_tells_them_apart_and_keeps_its_legend_off_the_curves(tmp_path: Path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    point = {"frames_right": 1.0, "stroke_mass_ratio": 1.0, "mean_speed": 1.5, "track_within_1px": 1.0}
    rows = {
        f"row {index}": {"first_21": point, "segments": [point] * 3, "segment_frames": 630, "num_frames": 1512} for index in range(13)
    }
    draw_drift(tmp_path / "drift.png", rows)
    (figure,), axis = figures, figures[0].axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 13
    assert axis.lines[0].get_xdata().tolist() == [10.5, 315, 945, 1386]  # the last stretch is short
    assert axis.get_xscale() == "log" and axis.get_legend() is None and len(figure.legends[0].get_texts()) == 13
    figure.canvas.draw()
    assert figure.legends[0].get_window_extent().y1 < min(each.get_window_extent().y0 for each in figure.axes)


def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(SystemExit, match="error: --num_frames is 21: expected at least 42"):
        main(["drift", "--num_frames", "21"])
    for options, words in (
        ([], "makes all frames at once: give --denoising_steps to roll it out"),
        (["--num_steps", "0"], "--num_steps is 0: expected at least 1"), (["--guidance", "-1"], "--guidance is -1.0: expected 0 or more"),
        (["--num_steps", "4", "--denoising_steps", "1000"], "--denoising_steps .* and --num_steps .* exclude each other"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{words}"):
            main(["drift", *options, *untrained(tmp_path, PretrainConfig())])
    student = untrained(tmp_path, SelfForcingConfig(window_frames=9, sink_frames=3))
    with pytest.raises(SystemExit, match="error: --sink_frames is 9: expected 0 to 6"):
        main(["drift", "--sink_frames", "9", *student])
