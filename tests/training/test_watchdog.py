"""The watchdog speaks when a run goes wrong, keeps quiet otherwise, and survives a resume."""

import json

import pytest

from training.watchdog import Watchdog

GOOD = {"frames_right": 0.95, "one_class": 0.7, "track_within_1px": 0.9, "stroke_mass_ratio": 1.1}
START = {"frames_right": 0.45, "one_class": 0.1, "track_within_1px": 0.6, "stroke_mass_ratio": 0.5}


def run(watchdog: Watchdog, steps: range, norm: float = 0.3, loss: float = 0.04, reading: dict[str, float] | None = None) -> list[str]:
    """So many steps with these figures, which waver by a third; the reading comes with the last."""
    lines = []
    for step in steps:
        waver = 1 + (step % 3 - 1) / 3
        figures = {"loss_critic": waver * loss} | ({"gradient_norm_generator": waver * norm} if step % 4 == 3 else {})
        lines += watchdog.observe(step, figures | ((reading or {}) if step == steps[-1] else {}))
    return lines


@pytest.fixture
def watched() -> Watchdog:
    """A run of 420 good steps."""
    watchdog = Watchdog()
    assert run(watchdog, range(1), reading=START) == [] and watchdog.is_best
    assert run(watchdog, range(1, 420), reading=GOOD) == [] and watchdog.is_best
    return watchdog


def test_a_good_run_is_quiet_and_its_verdict_is_no_collapse(watched):
    assert watched.verdict().startswith("verdict: no collapse; ") and "at step 420" in watched.verdict()


def test_the_collapse_that_was_seen_is_said_in_its_order(watched):
    """The published figures: the gradient norm leaves .3 at step 423, then the critic loses the generator, then the videos are gone."""
    norms = {423: 0.58, 427: 1.3, 431: 1.7, 451: 5.0}
    lines = [line for step, norm in norms.items() for line in watched.observe(step, {"gradient_norm_generator": norm})]
    assert lines == ["warning: step 428: the generator's gradient norm is 1.3, its median was 0.3"]  # once for one excursion
    (line,) = run(watched, range(451, 456), loss=0.98)
    assert line.startswith("warning: step 455: the critic's loss")
    (line,) = run(watched, range(456, 490), loss=0.04, norm=5, reading=GOOD | {"frames_right": 0.42, "stroke_mass_ratio": 2.6})[-1:]
    assert line.startswith("COLLAPSE: step 490: the fixed prompts read frames right 0.42") and "at step 420" in line
    assert not watched.is_best
    fallen = watched.verdict()
    assert fallen.startswith("verdict: COLLAPSED at step 490 (frames right 0.42") and "recovered" not in fallen
    run(watched, range(490, 560), reading=GOOD | {"frames_right": 0.9})
    assert watched.verdict().startswith("verdict: COLLAPSED at step 490 (frames right 0.42")
    assert all(part in watched.verdict() for part in (" and recovered; at the end frames right 0.90", "frames right 0.95"))


@pytest.mark.parametrize("mass", [1.6, 0.6])
def test_strokes_alone_can_show_a_collapse(watched, mass):
    (line,) = run(watched, range(420, 490), reading=GOOD | {"stroke_mass_ratio": mass})
    assert f"stroke mass {mass:.2f}" in line


def test_a_run_that_never_became_readable_is_not_called_collapsed():
    watchdog = Watchdog()
    assert run(watchdog, range(100), reading=START) == []
    assert watchdog.verdict().startswith("verdict: NOT LEARNED")
    assert Watchdog().verdict() == ""  # nothing was read


def test_the_state_passes_through_json_and_goes_on_as_if_nothing_had_happened(watched):
    other = Watchdog.from_state(json.loads(json.dumps(watched.state_dict())))
    assert other.state_dict() == watched.state_dict()
    for each in (watched, other):
        run(each, range(420, 440), norm=3, reading=GOOD | {"frames_right": 0.2})
    assert other.state_dict() == watched.state_dict() and other.verdict() == watched.verdict()
