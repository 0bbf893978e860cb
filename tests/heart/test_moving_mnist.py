"""Moving MNIST: physics, drawing, captions and the command line."""

import numpy as np
import pytest
import torch
from helpers.networks import load_self_test

import moving_mnist
from moving_mnist import DatasetConfig, MovingMNISTDataset, MovingMNISTGenerator, bounce
from network.text_encoder import SPEEDS, parse_caption

TENSORS = ("digits", "directions", "start", "velocity", "track")
ink_centre = load_self_test("moving_mnist")["ink_centre"]


@pytest.fixture(scope="module")
def generator() -> MovingMNISTGenerator:
    return MovingMNISTGenerator(DatasetConfig())


@pytest.fixture(scope="module")
def pair_generator() -> MovingMNISTGenerator:
    return MovingMNISTGenerator(DatasetConfig(frame_size=64, digit_size=28, num_digits=2))


# ---------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("variation", [0.0, 0.15])
def test_a_video_does_not_depend_on_its_batch_or_on_earlier_draws(variation):
    generator = MovingMNISTGenerator(DatasetConfig(frame_size=64, digit_size=28, num_digits=2), digit_variation=variation)
    batch, alone = (generator.sample(5, indices, 9) for indices in ([3, 900, 7, 3], [7]))
    for name in (*TENSORS, "video", "digit_index"):
        assert torch.equal(vars(batch)[name][2:3], vars(alone)[name]), name
        assert torch.equal(vars(batch)[name][0], vars(batch)[name][3]), name
    assert batch.captions[2:3] == alone.captions and batch.speeds[2:3] == alone.speeds


def test_the_draws_stay_what_they_were():
    """Checkpoints and reported numbers rest on these draws: (seed, index) must keep naming the same video."""
    batch = MovingMNISTGenerator(DatasetConfig(judge_fraction=0.0)).sample(0, [0, 1], 1)
    assert batch.captions == ["handwritten digit zero gliding to the right evenly", "handwritten digit 9 travelling downwards"]
    assert batch.digit_index.flatten().tolist() == [156, 4388]
    torch.testing.assert_close(batch.start[0, 0], torch.tensor([10.8479, 8.5057]), rtol=0, atol=1e-4)


def test_a_longer_video_continues_a_shorter_one(generator):
    short, long = generator.sample(2, range(4), 5), generator.sample(2, range(4), 30)
    assert torch.equal(short.video, long.video[:, :5]) and torch.equal(short.track, long.track[:, :5])
    assert short.captions == long.captions


# -------------------------------------------------------------------------------------------------------- physics


@pytest.mark.parametrize("variation", [0.0, 0.2])
def test_what_was_before_shows_the_other_digit_at_its_speed_and_arrives_where_the_video_begins(variation):
    generator = MovingMNISTGenerator(DatasetConfig(), "train", variation)
    indices, others = range(8), [*range(1, 8), 0]
    own, other = generator.sample(3, indices, 6), generator.sample(3, others, 6)
    before = generator.before(3, indices, others, 30)
    assert before.shape == (8, 30, 1, 32, 32)
    centres, ink = ink_centre(torch.cat([before, other.video], dim=1))  # (B, 36, 2), (B, 36)
    path = centres[:, :30] + other.start - centres[:, 30:31]  # of the boxes, as `start` is
    arrives = path[:, -1] + other.velocity[:, 0]
    inside = (arrives > 7).all(1) & (arrives < 24).all(1)  # no bounce in the last step
    assert inside.sum() >= 3
    torch.testing.assert_close(arrives[inside], own.start[inside, 0].double(), atol=2e-3, rtol=0)
    step = centres[:, 1:30].sub(centres[:, :29]).abs()  # a bounce shortens a step
    assert (step <= other.velocity.abs() + 2e-3).all() and ((step - other.velocity.abs()).abs() < 2e-3).all(2).float().mean() > 0.7
    torch.testing.assert_close(ink, ink[:, 30:31].expand(-1, 36), rtol=2e-3, atol=0)  # the other's digit


def test_track_equals_a_step_by_step_simulation_of_the_bounces(generator):
    batch = generator.sample(1, range(64), 60)
    position, velocity = batch.start[:, 0].double(), batch.velocity[:, 0].double()
    low, high = 6.5, 31 - 6.5
    num_bounces = 0
    for frame in range(60):
        torch.testing.assert_close(batch.track[:, frame, 0].double(), position, rtol=0, atol=1e-4)
        position = position + velocity
        for wall, is_outside in ((low, position < low), (high, position > high)):
            position = torch.where(is_outside, 2 * wall - position, position)
            velocity = torch.where(is_outside, -velocity, velocity)
            num_bounces += int(is_outside.sum())
    assert num_bounces > 100


def test_bounce_is_exact_after_any_time():
    assert bounce(torch.tensor([0.0, 3.0, 10.0, 12.0, 20.0, -3.0, 1e9 + 4], dtype=torch.float64), 10.0).tolist() \
        == [0, 3, 10, 8, 0, 3, 4]


def test_directions_turn_counter_clockwise_on_the_screen_within_the_jitter(generator):
    batch = generator.sample(3, range(400), 1)
    assert batch.directions.unique().tolist() == list(range(8))
    angle = torch.rad2deg(torch.atan2(-batch.velocity[..., 1], batch.velocity[..., 0]))
    error = (angle - 45 * batch.directions + 180) % 360 - 180
    assert error.abs().max() <= 15 + 1e-3 and error.abs().max() > 13 and error.mean().abs() < 2


def test_speeds_lie_in_their_range_and_words_are_its_thirds(generator):
    batch = generator.sample(3, range(400), 1)
    speed = batch.velocity.norm(dim=-1)
    assert 1.2 <= speed.min() < 1.25 and 2.15 < speed.max() <= 2.2 + 1e-5
    expected = [[SPEEDS[min(int(value * 3), 2)]] for value in (speed.flatten() - 1.2).tolist()]
    assert batch.speeds == expected
    steady = MovingMNISTGenerator(DatasetConfig(min_speed=1.5, max_speed=1.5)).sample(0, range(9), 1)
    assert steady.speeds == [["medium"]] * 9


def test_starts_are_uniform_over_the_allowed_box(generator):
    start = generator.sample(8, range(1000), 1).start.flatten(0, 1)
    share = (start - 6.5) / 18
    assert share.min() >= 0 and share.max() <= 1
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert (torch.quantile(share, quantile, dim=0) - quantile).abs().max() < 0.05
    assert torch.corrcoef(share.T)[0, 1].abs() < 0.1  # x and y are drawn apart


def test_deformed_digits_move_as_the_undeformed_and_say_the_same(pair_generator):
    varied_generator = MovingMNISTGenerator(pair_generator.config, digit_variation=0.15)
    plain, varied = (each.sample(5, range(6), 4) for each in (pair_generator, varied_generator))
    assert plain.captions == varied.captions and plain.speeds == varied.speeds
    for name in (*TENSORS, "digit_index"):
        assert torch.equal(vars(plain)[name], vars(varied)[name]), name
    moved = (plain.video - varied.video).abs().amax(dim=(1, 2, 3, 4))
    assert (moved > 0.5).all()


# -------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("digit_size", [14, 13, 20])
def test_ink_moves_with_the_track_and_none_is_lost(digit_size):
    generator = MovingMNISTGenerator(DatasetConfig(digit_size=digit_size), "test")
    batch = generator.sample(0, range(32), 40)
    centre, mass = ink_centre(batch.video)
    offset = centre - batch.track[:, :, 0]
    assert offset.std(dim=1).max() < 1e-4
    torch.testing.assert_close(mass, mass[:, :1].expand_as(mass), rtol=1e-4, atol=0)
    assert offset.mean().abs() < 0.5  # real digits are centred in their box, so the track is near the ink

    sprites = generator.sprites[batch.digit_index[:, 0]]
    sprite_centre, sprite_mass = ink_centre((2 * sprites - 1)[:, None, None])
    torch.testing.assert_close(mass[:, 0], sprite_mass[:, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(offset[:, 0], sprite_centre[:, 0] - (digit_size - 1) / 2, rtol=0, atol=1e-4)


def test_at_whole_pixels_a_digit_is_copied(generator):
    sprite = generator.sprites[:1]  # (1, D, D)
    track = torch.tensor([5.0, 9.0]).view(1, 1, 1, 2) + 6.5
    expected = -torch.ones(32, 32)
    expected[9:23, 5:19] = 2 * sprite[0] - 1
    torch.testing.assert_close(generator.render(sprite.unsqueeze(1), track)[0, 0, 0], expected)


def test_half_size_digits_are_means_of_two_by_two_pixels(generator):
    image = generator.digit_set.images[17].float() / 255
    torch.testing.assert_close(generator.sprites[17], image.view(14, 2, 14, 2).mean(dim=(1, 3)))


def test_overlapping_digits_show_the_brighter_one(pair_generator):
    batch = pair_generator.sample(0, range(16), 9)
    sprites = pair_generator.sprites[batch.digit_index]  # (B, 2, D, D)
    layers = [pair_generator.render(sprites[:, n:n + 1], batch.track[:, :, n:n + 1]) for n in range(2)]
    torch.testing.assert_close(batch.video, torch.maximum(*layers))
    assert ((layers[0] > -0.5) & (layers[1] > -0.5)).any(), "no digits overlap here: nothing was tested"


def test_three_channels_repeat_the_grey_value(generator):
    colour = MovingMNISTGenerator(DatasetConfig(channels=3)).sample(0, [0], 3).video
    assert colour.shape == (1, 3, 3, 32, 32)
    assert torch.equal(colour, generator.sample(0, [0], 3).video.expand(-1, -1, 3, -1, -1))


# ------------------------------------------------------------------------------------------------ captions, dataset


@pytest.mark.parametrize("num_digits", [1, 2])
def test_captions_tell_the_truth(num_digits):
    generator = MovingMNISTGenerator(DatasetConfig(num_digits=num_digits))
    batch = generator.sample(1, range(200), 1)
    num_named = 0
    for row, caption in enumerate(batch.captions):
        facts = parse_caption(caption)
        assert list(facts.digits) == batch.digits[row].tolist()
        assert torch.equal(batch.digits[row], generator.digit_set.labels[batch.digit_index[row]])
        for n in range(num_digits):
            assert facts.directions[n] in (None, batch.directions[row, n].item())
            assert facts.speeds[n] in (None, batch.speeds[row][n])
            num_named += facts.directions[n] is not None
    assert num_named > 0.7 * 200 * num_digits


def test_classes_with_names_are_called_by_them_and_drawn_as_ever(generator):
    names = ["null", "eins", "zwei", "drei", "vier", "fuenf", "sechs", "sieben", "acht", "neun"]
    named_generator = MovingMNISTGenerator(DatasetConfig(class_names=names))
    named, plain = (each.sample(0, range(20), 3) for each in (named_generator, generator))
    assert torch.equal(named.digits, plain.digits) and torch.equal(named.video, plain.video)
    expected = [names[digit] for digit in named.digits[:, 0].tolist()]
    assert all(name in caption.split() for name, caption in zip(expected, named.captions, strict=True))
    later = named_generator.captions_of_any_stretch(0, range(20))
    assert later == [f"the {name}" for name in expected]  # no direction: it changes at the walls


def test_dataset_serves_the_generators_videos(generator):
    dataset = MovingMNISTDataset(generator, seed=4, length=5, num_frames=6)
    batch = generator.sample(4, range(5), 6)
    loaded = next(iter(torch.utils.data.DataLoader(dataset, batch_size=5)))
    assert len(dataset) == 5 and loaded["caption"] == batch.captions
    for name in (*TENSORS, "video"):
        assert torch.equal(loaded[name], vars(batch)[name]), name
    with pytest.raises(IndexError, match="video 5 of 5"):
        dataset[5]
    with pytest.raises(ValueError, match="dataset length is 0"):
        MovingMNISTDataset(generator, seed=4, length=0, num_frames=6)


# ----------------------------------------------------------------------------------- configuration and command line


@pytest.mark.parametrize("field, values", [
    ("digit_size", {"digit_size": 29, "frame_size": 64}), ("frame_size", {"frame_size": 14}), ("num_digits", {"num_digits": 3}),
    ("min_speed", {"min_speed": float("nan")}), ("max_speed", {"max_speed": 1.0}), ("source", {"source": "web"}),
    ("direction_jitter_degrees", {"direction_jitter_degrees": 23.0}), ("mnist_root", {"source": "idx"}),
    ("download", {"download": True}), ("test_fraction", {"test_fraction": 1.0}), ("class_names", {"class_names": [*"abcdefghi", "A"]}),
])
def test_impossible_settings_are_refused_by_name(field, values):
    with pytest.raises(ValueError, match=f"^dataset.{field} is .*: expected ") as caught:
        DatasetConfig(**values)
    assert "\n" not in str(caught.value)


def test_the_command_line_checks_itself_and_explains_what_is_wrong(capsys):
    assert moving_mnist.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.startswith("ok ") for line in lines)
    for arguments, words in (
        (["--digit_size", "40"], "dataset.digit_size is 40"), (["--num_frames", "0"], "num_frames is 0"),
        (["--visualize", "--num_viz", "0"], "--num_viz is 0"), (["--mnist_root", "no/such"], "lacks the MNIST files"),
    ):
        with pytest.raises(SystemExit) as caught:
            moving_mnist.main(arguments)
        assert caught.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_visualize_writes_animations_and_a_grid(tmp_path, capsys):
    import imageio.v3 as imageio
    call = ["--visualize", "--num_viz", "2", "--num_digits", "2", "--num_frames", "3", "--digit_size", "10", "--output_dir", str(tmp_path)]
    assert moving_mnist.main(call) == 0
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(first) == ["grid.png", "sample_00.gif", "sample_01.gif"]
    batch = MovingMNISTGenerator(DatasetConfig(num_digits=2, digit_size=10)).sample(0, [1], 3)
    np.testing.assert_allclose(imageio.imread(tmp_path / "sample_01.gif")[:, ::4, ::4, 0] / 127.5 - 1, batch.video[0, :, 0], atol=0.05)
    assert batch.captions[0] in capsys.readouterr().out
    assert moving_mnist.main([*call, "--seed", "1"]) == 0
    second = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: second[name] for name in first} == first, "a second call overwrites nothing"
    assert sorted(second.keys() - first) == ["grid_2.png", "sample_00_2.gif", "sample_01_2.gif"]
    assert second["sample_00_2.gif"] != first["sample_00.gif"]
