"""Long video: what the figures say of paths and readings that are known."""

import json
from pathlib import Path

import pytest
import torch

from long_video import SWITCHES, main, summarise_switch
from moving_mnist import DatasetConfig, MovingMNISTGenerator

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


def test_what_cannot_be_measured_is_refused_in_one_line():
    with pytest.raises(SystemExit, match="error: --num_frames is 21: expected at least 42"):
        main(["drift", "--num_frames", "21"])
