"""Prompts: the caption grammar, the word tokenizer and the text encoder.

Dimensions: B batch, L tokens in a prompt, D embedding width.

A prompt says which digits a Moving MNIST video shows, in which direction each starts to move, and how fast. Directions are numbered
counter-clockwise from "right" in steps of 45 degrees, as seen on the screen ("up" is a decreasing row).
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

NULL_PROMPT = ""  # the prompt of classifier-free guidance's unconditional branch (Ho and Salimans, arXiv 2207.12598)
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTION_PHRASES = (
    ("to the right", "right", "rightwards"),
    ("up and to the right", "up and right", "to the upper right"),
    ("up", "upwards", "straight up"),
    ("up and to the left", "up and left", "to the upper left"),
    ("to the left", "left", "leftwards"),
    ("down and to the left", "down and left", "to the lower left"),
    ("down", "downwards", "straight down"),
    ("down and to the right", "down and right", "to the lower right"),
)
SPEED_WORDS = {"slow": ("slowly", "gently", "calmly"), "medium": ("steadily", "evenly"), "fast": ("quickly", "fast", "rapidly")}
SPEEDS = tuple(SPEED_WORDS)
_MOTION_VERBS = ("moving", "drifting", "gliding", "sliding", "travelling")
_SINGLE_NOUNS = ("a handwritten {}", "the digit {}", "a {}", "handwritten digit {}", "the number {}")
_PAIR_NOUNS = ("digits {} and {}", "a {} and a {}", "two handwritten digits {} and {}", "the numbers {} and {}")
_FREE_MOTION = ("bouncing around", "moving around", "bouncing off the walls")
_NAMED_NOUNS, _NAMED_PAIR = ("the {}", "{}"), ("the {} and the {}", "{} and {}")  # of classes that are not digits


@dataclass(frozen=True)
class MotionFacts:
    """What a caption says of one digit. digit: 0..9. direction: 0..7, counter-clockwise from right. speed: a key of `SPEED_WORDS`."""

    digit: int
    direction: int
    speed: str


@dataclass(frozen=True)
class CaptionFacts:
    """What can be read back from a prompt: None where the prompt does not say."""

    digits: tuple[int, ...]
    directions: tuple[int | None, ...]
    speeds: tuple[str | None, ...]


def compose_caption(facts: list[MotionFacts], rng: np.random.Generator, class_names: list[str] | None = None) -> str:
    """One caption for one or two digits, of random templates and synonyms: 85 % name the direction, and half of those the speed too.
    class_names: names of the ten classes if they are not digits."""
    single_nouns, pair_nouns = (_SINGLE_NOUNS, _PAIR_NOUNS) if class_names is None else (_NAMED_NOUNS, _NAMED_PAIR)

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    def digit_word(digit: int) -> str:
        if class_names is not None:
            return class_names[digit]
        return str(digit) if rng.random() < 0.75 else DIGIT_WORDS[digit]

    def motion(fact: MotionFacts) -> str:
        speed = f" {pick(SPEED_WORDS[fact.speed])}" if rng.random() < 0.5 else ""
        return f"{pick(_MOTION_VERBS)} {pick(DIRECTION_PHRASES[fact.direction])}{speed}"

    if rng.random() < 0.85:
        return " and ".join(f"{pick(single_nouns).format(digit_word(fact.digit))} {motion(fact)}" for fact in facts)
    subject = pick(single_nouns if len(facts) == 1 else pair_nouns).format(*(digit_word(fact.digit) for fact in facts))
    return subject if rng.random() < 0.5 else f"{subject} {pick(_FREE_MOTION)}"


def caption_of_any_stretch(caption: str) -> str:
    """The part of a caption that holds for every stretch of its video: the digits, as directions change at the walls. A caption that names
    no digit, or more than two, is returned as it is."""
    digits = parse_caption(caption).digits
    nouns = {1: _SINGLE_NOUNS, 2: _PAIR_NOUNS}
    return nouns[len(digits)][0].format(*digits) if len(digits) in nouns else caption


def name_classes(names: list[str]) -> str:
    """A caption that only names one or two classes."""
    return (_NAMED_NOUNS if len(names) == 1 else _NAMED_PAIR)[0].format(*names)


def split_words(prompt: str) -> list[str]:
    """Lower-case words and single digits of a prompt, in order; punctuation separates and is dropped."""
    return re.findall(r"[0-9]|[^\W\d_]+", prompt.lower())


_PHRASES = (
    *DIGIT_WORDS, *map(str, range(10)), *_MOTION_VERBS, *_SINGLE_NOUNS, *_PAIR_NOUNS, *_FREE_MOTION, *chain(*DIRECTION_PHRASES),
    *chain(*SPEED_WORDS.values()),
)
VOCABULARY = tuple(sorted({word for phrase in _PHRASES for word in split_words(phrase)}))


def vocabulary_with(class_names: list[str]) -> list[str]:
    """The grammar's words, then the new ones of the class names."""
    return [*VOCABULARY, *dict.fromkeys(word for name in class_names for word in split_words(name) if word not in VOCABULARY)]


PAD_TOKEN, START_TOKEN = 0, 1  # every prompt begins with START, so the null prompt has a token to attend to
NUM_SPECIAL_TOKENS = 2


def parse_caption(prompt: str) -> CaptionFacts:
    """Read digits, directions and speeds back from a prompt in the grammar's words. A direction or speed belongs to the last digit named
    before it."""
    digits: list[int] = []
    axes: list[list[int]] = []  # per digit: [horizontal, vertical] in {-1, 0, 1}
    speeds: list[str | None] = []
    speed_of = {word: speed for speed, group in SPEED_WORDS.items() for word in group}
    horizontal = {"right": 1, "rightwards": 1, "left": -1, "leftwards": -1}
    vertical = {"up": 1, "upwards": 1, "upper": 1, "down": -1, "downwards": -1, "lower": -1}
    for word in split_words(prompt.lower().replace("two handwritten digits", "digits")):  # a count there, not a digit
        if word.isdecimal() or word in DIGIT_WORDS:
            digits.append(int(word) if word.isdecimal() else DIGIT_WORDS.index(word))
            axes.append([0, 0])
            speeds.append(None)
        elif digits and word in horizontal:
            axes[-1][0] = horizontal[word]
        elif digits and word in vertical:
            axes[-1][1] = vertical[word]
        elif digits and word in speed_of:
            speeds[-1] = speed_of[word]
    octant = {(1, 0): 0, (1, 1): 1, (0, 1): 2, (-1, 1): 3, (-1, 0): 4, (-1, -1): 5, (0, -1): 6, (1, -1): 7}
    return CaptionFacts(tuple(digits), tuple(octant.get((h, v)) for h, v in axes), tuple(speeds))


@dataclass
class TextEncoderConfig:
    """Sizes of the text encoder."""

    width: int = 64  # D of the embeddings, a multiple of 32
    max_tokens: int = 24  # L, longer prompts are cut
    vocabulary: list[str] | None = None  # known words; those of the grammar if not given

    def __post_init__(self) -> None:
        if self.width < 32 or self.width % 32:
            raise ValueError(f"text.width is {self.width}: expected a positive multiple of 32")
        if self.max_tokens < 2:
            raise ValueError(f"text.max_tokens is {self.max_tokens}: expected at least 2")

    @property
    def words(self) -> tuple[str, ...]:
        """The words known, in the order of their tokens."""
        return VOCABULARY if self.vocabulary is None else tuple(self.vocabulary)


class TextEncoder(nn.Module):
    """Word embeddings with learned positions and one pre-norm transformer layer (the role umT5 plays in Wan), trained with the teacher and
    frozen afterwards. Every prompt is padded to `config.max_tokens`: its embedding does not depend on what else is in the batch."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.vocabulary = config.words
        self._tokens = {word: index for index, word in enumerate(self.vocabulary, NUM_SPECIAL_TOKENS)}
        self.token_embedding = nn.Embedding(len(self._tokens) + NUM_SPECIAL_TOKENS, config.width, padding_idx=PAD_TOKEN)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(config.max_tokens, config.width))
        self.layer = nn.TransformerEncoderLayer(
            config.width, nhead=config.width // 32, dim_feedforward=4 * config.width, dropout=0.0,
            activation="gelu", batch_first=True, norm_first=True,
        )
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=1.0)
        with torch.no_grad():
            self.token_embedding.weight[PAD_TOKEN].zero_()

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token numbers (B, L), int64, padded with `PAD_TOKEN`, on the encoder's device. Warns of unknown words, which are left out, and
        of words past `max_tokens`, which are cut."""
        length = self.config.max_tokens
        words = [split_words(prompt) for prompt in prompts]
        ids = [[START_TOKEN, *(self._tokens[word] for word in row if word in self._tokens)] for row in words]
        unknown = list(dict.fromkeys(word for word in chain(*words) if word not in self._tokens))
        if unknown:
            more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
            named = ", ".join(word[:40] for word in unknown[:20])
            known = ", ".join(self.vocabulary)
            warnings.warn(f"unknown words left out of the prompts: {named}{more}. Known words: {known}", stacklevel=2)
        num_cut = sum(len(row) > length for row in ids)
        if num_cut:
            warnings.warn(f"{num_cut} prompts are longer than {length - 1} words: the rest was cut", stacklevel=2)
        padded = [row[:length] + [PAD_TOKEN] * (length - len(row)) for row in ids]
        return torch.tensor(padded, device=self.position_embedding.device)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) of token numbers (B, L), and their mask (B, L): False for padding."""
        mask = tokens != PAD_TOKEN
        x = self.token_embedding(tokens) + self.position_embedding  # (B, L, D)
        x = self.layer(x, src_key_padding_mask=~mask)
        return self.norm(x) * mask.unsqueeze(-1), mask

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of text prompts: `tokenize`, then `forward`."""
        return self(self.tokenize(prompts))
