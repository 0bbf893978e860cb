"""Is a Self-Forcing run going wrong right now? It says so in one line when it happens, and at the end what became of it.

It changes nothing in the training, and looks at figures that a run has anyway: the generator's gradient norm and the critic's loss against
their running medians, which warn, and what the judge reads in the fixed prompts (`judging.prompts`), which decides.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

MIN_HISTORY = 12  # values before a median means anything
MEMORY = 60  # values of a running median
NORM_SPIKE = 4.0  # times its median: a gradient norm that is leaving
LOSS_SPIKE = 4.0  # times its median, over the last RECENT values: the critic has lost the generator
RECENT = 4
READABLE = 0.5  # of frames right: from then on a run has something to lose
WORST_FALL = 0.2  # of frames right below the best reading so far
HEAVIEST = 1.5  # stroke mass over that of real video; its inverse is as wrong
QUIET_STEPS = 40  # after a warning, before the next of its kind


@dataclass(frozen=True)
class Reading:
    """What the judge read in the fixed prompts after so many finished steps: `health.JUDGED_COLUMNS`."""

    step: int
    frames_right: float
    one_class: float
    track_within_1px: float
    stroke_mass_ratio: float

    @property
    def quality(self) -> float:
        """Higher is better: the mean of the three shares, less what the strokes' mass is off by."""
        shares = (self.frames_right + self.one_class + self.track_within_1px) / 3
        return shares - abs(self.stroke_mass_ratio - 1)

    def __str__(self) -> str:
        return (
            f"frames right {self.frames_right:.2f}, one class {self.one_class:.2f}, track {self.track_within_1px:.2f}, "
            f"stroke mass {self.stroke_mass_ratio:.2f}"
        )


@dataclass
class Watchdog:
    """Watches one run. `observe` after every step; `verdict` at the end; the state is a plain dict."""

    norms: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY))
    critic_losses: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY))
    last_warning: dict[str, int] = field(default_factory=dict)  # step, by kind
    best: Reading | None = None
    latest: Reading | None = None
    collapse: Reading | None = None  # the first reading that had lost what was there

    def observe(self, step: int, figures: dict[str, float]) -> list[str]:
        """Take in the figures of this step, 0 the first; returns what is to be said of them, a line each."""
        finished, lines = step + 1, []
        if "gradient_norm_generator" in figures:
            norm = figures["gradient_norm_generator"]
            if len(self.norms) >= MIN_HISTORY and norm > NORM_SPIKE * median(self.norms):
                self._warn(lines, "norm", finished, f"the generator's gradient norm is {norm:.2g}, its median was {median(self.norms):.2g}")
            self.norms.append(norm)
        if "loss_critic" in figures:
            self.critic_losses.append(figures["loss_critic"])
            earlier, recent = list(self.critic_losses)[:-RECENT], list(self.critic_losses)[-RECENT:]
            if len(earlier) >= MIN_HISTORY and min(recent) > LOSS_SPIKE * median(earlier):
                found = f"the critic's loss was at least {min(recent):.2g} for {RECENT} steps, its median {median(earlier):.2g}"
                self._warn(lines, "critic", finished, found)
        if "frames_right" in figures:
            names = ("frames_right", "one_class", "track_within_1px", "stroke_mass_ratio")
            lines += self._read(Reading(finished, *(figures[name] for name in names)))
        return lines

    def _read(self, reading: Reading) -> list[str]:
        self.latest, is_lost = reading, self._is_lost(reading)
        if self.best is None or reading.quality > self.best.quality:
            self.best = reading
        if not is_lost:
            return []
        self.collapse = self.collapse or reading
        where = f", the best was {self.best} at step {self.best.step}" if self.best is not reading else ""
        return [f"COLLAPSE: step {reading.step}: the fixed prompts read {reading}{where}"]

    def _is_lost(self, reading: Reading) -> bool:
        """Is what the best reading so far had lost in this one: the digits, or strokes of a digit's weight?"""
        best = 0.0 if self.best is None else self.best.frames_right
        is_off = not 1 / HEAVIEST <= reading.stroke_mass_ratio <= HEAVIEST
        return best >= READABLE and (reading.frames_right < best - WORST_FALL or is_off)

    def _warn(self, lines: list[str], kind: str, finished: int, found: str) -> None:
        if finished - self.last_warning.get(kind, -QUIET_STEPS) >= QUIET_STEPS:
            self.last_warning[kind] = finished
            lines.append(f"warning: step {finished}: {found}")

    @property
    def is_best(self) -> bool:
        """Is the newest reading the best so far?"""
        return self.best is not None and self.best is self.latest

    def verdict(self) -> str:
        """What became of the run, in one line; empty where no fixed prompt was read."""
        if self.best is None or self.latest is None:
            return ""
        if self.best.frames_right < READABLE:
            return f"verdict: NOT LEARNED: the fixed prompts read at best {self.best}, at step {self.best.step}"
        end = f"at the end {self.latest}, at best {self.best} at step {self.best.step}"
        if self.collapse is None:
            return f"verdict: no collapse; the fixed prompts read {end}"
        after = "" if self._is_lost(self.latest) else " and recovered"
        return f"verdict: COLLAPSED at step {self.collapse.step} ({self.collapse}){after}; {end}"

    def state_dict(self) -> dict[str, Any]:
        readings = {"best": self.best, "latest": self.latest, "collapse": self.collapse}
        return {
            "norms": list(self.norms), "critic_losses": list(self.critic_losses), "last_warning": dict(self.last_warning),
            **{name: None if reading is None else asdict(reading) for name, reading in readings.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms.extend(state["norms"])
        self.critic_losses.extend(state["critic_losses"])
        self.last_warning = dict(state["last_warning"])
        self.best, self.latest, self.collapse = (
            None if state[name] is None else Reading(**state[name]) for name in ("best", "latest", "collapse")
        )
