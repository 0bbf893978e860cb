"""Device and number format; digests of code."""

import pytest
import torch

from machine import runtime
from machine.runtime import Runtime, resolve_runtime


def only(monkeypatch, *, cuda: bool = False, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(("device", "words"), [
    *((name, "which this machine does not have; found: cpu") for name in ("cuda", "mps")), ("gpu", "expected auto, cpu, cuda or mps"),
])
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, words):
    only(monkeypatch)
    with pytest.raises(ValueError, match=f"device is {device}.*{words}"):
        resolve_runtime(device, "float32")


def test_auto_takes_the_best_that_is_there(monkeypatch):
    only(monkeypatch, cuda=True, mps=True)
    assert resolve_runtime("auto", "float32").device.type == "cuda"
    only(monkeypatch, mps=True)
    assert resolve_runtime("auto", "auto") == Runtime(torch.device("mps"), torch.float32)
    only(monkeypatch)
    assert resolve_runtime("auto", "float32").device.type == "cpu"


@pytest.mark.parametrize("has_it, gain, pays", [(True, 2.0, True), (True, 1.1, False), (True, 0.5, False), (False, 2.0, False)])
def test_bfloat16_must_be_there_and_be_faster(monkeypatch, has_it, gain, pays):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    monkeypatch.setattr(runtime, "gain_over_float32", lambda dtype: gain)
    assert resolve_runtime("cpu", "auto").dtype == (torch.bfloat16 if pays else torch.float32)
    assert resolve_runtime("cpu", "float32").dtype == torch.float32  # as asked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_the_gain_is_a_ratio_of_times_measured_once(monkeypatch, dtype):
    runtime.gain_over_float32.cache_clear()
    ticks = iter([tick for _ in range(10) for tick in (0.0, 3.0, 0.0, 2.0)])  # float32 takes 3, the other 2
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(ticks))
    assert runtime.gain_over_float32(dtype) == runtime.gain_over_float32(dtype) == 1.5
    runtime.gain_over_float32.cache_clear()


@pytest.mark.parametrize("gain, words", [(0.01, "takes 100.0 times as long as in float32"), (0.9, None), (2.0, None)])
def test_a_format_that_this_processor_is_slow_in_is_said(monkeypatch, recwarn, gain, words):
    monkeypatch.setattr(runtime, "gain_over_float32", lambda dtype: gain)
    assert resolve_runtime("cpu", "bfloat16").dtype == torch.bfloat16
    assert [words in str(each.message) for each in recwarn] == ([] if words is None else [True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_the_runtimes_format(dtype):
    with Runtime(torch.device("cpu"), dtype).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def write_house(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_digest_is_of_the_text_wherever_it_lies(tmp_path, monkeypatch):
    digests = []
    for place, change in (("here", ""), ("there", ""), ("there", "# a change\n")):
        files = {"train.py": "", "method/losses.py": "# losses\n" + change, "tests/test_x.py": place, "docs/draw.py": place}
        write_house(tmp_path / place, files)
        monkeypatch.setattr(runtime, "REPOSITORY", tmp_path / place)
        digests.append(runtime.code_digest())
    assert digests[0] == digests[1] != digests[2] and len(digests[0]) == 64


def test_a_digest_of_some_modules_covers_what_they_import_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "REPOSITORY", tmp_path)
    digests = []
    for changed in (
        {"generate.py": "from sampling.samplers import sample\n", "sampling/samplers.py": "from method.deep import (\n    f,\n)\n",
         "method/deep.py": "def f():\n    from machine import deep, deeper\n", "machine/deeper.py": ""},
        {"generate.py": "from sampling.samplers import sample as s\n"}, {"machine/deeper.py": "x = 1\n"},
    ):
        write_house(tmp_path, changed)
        digests.append(runtime.code_digest("sampling.samplers"))
    assert digests[0] == digests[1] != digests[2]
