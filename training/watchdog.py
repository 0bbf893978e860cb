"""Watches a Self-Forcing run: one line when it goes wrong, and a verdict at the end.

It changes nothing in the training. The generator's gradient norm and the critic's loss against their running medians warn; what the judge
reads in the fixed prompts (`judging.prompts`) decides.
"""

from __future__ import annotations

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
READ = ("frames_right", "one_class", "track_within_1px", "stroke_mass_ratio")  # figures of a reading


@dataclass(frozen=True)
class Reading:
    """What the judge read in the videos of the fixed prompts after `step` finished steps."""

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

    norms: list[float] = field(default_factory=list)  # the last MEMORY
    critic_losses: list[float] = field(default_factory=list)
    last_warning: dict[str, int] = field(default_factory=dict)  # step, by kind
    best: Reading | None = None
    latest: Reading | None = None
    collapse: Reading | None = None  # the first reading that had lost what was there

    def observe(self, step: int, figures: dict[str, float]) -> list[str]:
        """Take in the figures of this step, counted from 0; returns the lines to print."""
        finished, lines = step + 1, []
        if "gradient_norm_generator" in figures:
            norm = figures["gradient_norm_generator"]
            if len(self.norms) >= MIN_HISTORY and norm > NORM_SPIKE * median(self.norms):
                self._warn(lines, "norm", finished, f"the generator's gradient norm is {norm:.2g}, its median was {median(self.norms):.2g}")
            self.norms = [*self.norms, norm][-MEMORY:]
        if "loss_critic" in figures:
            self.critic_losses = [*self.critic_losses, figures["loss_critic"]][-MEMORY:]
            earlier, recent = self.critic_losses[:-RECENT], self.critic_losses[-RECENT:]
            if len(earlier) >= MIN_HISTORY and min(recent) > LOSS_SPIKE * median(earlier):
                found = f"the critic's loss was at least {min(recent):.2g} for {RECENT} steps, its median {median(earlier):.2g}"
                self._warn(lines, "critic", finished, found)
        if "frames_right" in figures:
            lines += self._read(Reading(finished, *(figures[name] for name in READ)))
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
        """Has this reading lost the digits, or the right weight of their strokes, that the best one so far had?"""
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
        end = f"at the end {self.latest}, at best (digits and strokes together) {self.best} at step {self.best.step}"
        if self.collapse is None:
            return f"verdict: no collapse; the fixed prompts read {end}"
        after = "" if self._is_lost(self.latest) else " and recovered"
        return f"verdict: COLLAPSED at step {self.collapse.step} ({self.collapse}){after}; {end}"

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Watchdog:
        """The inverse of `state_dict`."""
        return cls(**state | {name: state[name] and Reading(**state[name]) for name in ("best", "latest", "collapse")})
