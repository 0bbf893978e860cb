"""Captions: the grammar, its reading back, the tokenizer and the encoder."""

import itertools
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from network.text_encoder import (
    DIGIT_WORDS,
    DIRECTION_PHRASES,
    NULL_PROMPT,
    NUM_SPECIAL_TOKENS,
    PAD_TOKEN,
    SPEED_WORDS,
    SPEEDS,
    START_TOKEN,
    VOCABULARY,
    CaptionFacts,
    MotionFacts,
    TextEncoder,
    TextEncoderConfig,
    caption_of_any_stretch,
    compose_caption,
    parse_caption,
    split_words,
    vocabulary_with,
)


def random_captions(num_digits: int, count: int = 500) -> Iterator[tuple[list[MotionFacts], str]]:
    rng = np.random.default_rng(num_digits)
    for _ in range(count):
        facts = [MotionFacts(int(rng.integers(10)), int(rng.integers(8)), SPEEDS[rng.integers(3)]) for _ in range(num_digits)]
        yield facts, compose_caption(facts, rng)


def tokenize_without_warning(encoder: TextEncoder, prompts: list[str]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return encoder.tokenize(prompts)


@pytest.mark.parametrize("num_digits", [1, 2])
def test_what_holds_for_any_stretch_names_the_digits_in_words_of_the_grammar_and_no_motion(num_digits):
    nothing = (None,) * num_digits
    for facts, caption in random_captions(num_digits, 50):
        kept = caption_of_any_stretch(caption)
        assert parse_caption(kept) == CaptionFacts(tuple(fact.digit for fact in facts), nothing, nothing), caption
        assert set(split_words(kept)) <= set(VOCABULARY)
    assert [caption_of_any_stretch(caption) for caption in ("", "moving up")] == ["", "moving up"]


@pytest.mark.parametrize("num_things", [1, 2])
def test_captions_of_named_classes_name_them_and_no_digit(num_things):
    names = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
    words, rng = vocabulary_with(names), np.random.default_rng(0)
    assert words[: len(VOCABULARY)] == list(VOCABULARY) and len(words) == len(set(words))
    for first in range(10):
        facts = [MotionFacts((first + other) % 10, 3, "slow") for other in range(num_things)]
        for caption in (compose_caption(facts, rng, names) for _ in range(20)):
            assert all(names[fact.digit] in caption for fact in facts) and parse_caption(caption).digits == (), caption
            assert set(split_words(caption)) <= set(words) and "handwritten" not in caption
    encoder = TextEncoder(TextEncoderConfig(width=32, vocabulary=words))
    sneaker, boot = tokenize_without_warning(encoder, ["the sneaker moving up", "the ankle boot moving up"])
    assert sneaker.tolist() != boot.tolist() and len(encoder.token_embedding.weight) == len(words) + 2


@pytest.mark.parametrize("num_digits", [1, 2])
def test_what_a_caption_names_is_read_back(num_digits):
    num_with_motion, num_speeds = 0, 0
    for facts, caption in random_captions(num_digits):
        said, words = parse_caption(caption), split_words(caption)
        assert set(words) <= set(VOCABULARY) and len(words) < TextEncoderConfig().max_tokens, caption
        assert said.digits == tuple(fact.digit for fact in facts), caption
        if any(direction is not None for direction in said.directions):
            num_with_motion += 1
            assert said.directions == tuple(fact.direction for fact in facts), caption
        for fact, direction, speed in zip(facts, said.directions, said.speeds, strict=True):
            assert speed is None or (speed == fact.speed and direction is not None), caption
            num_speeds += speed is not None
    assert 0.80 < num_with_motion / 500 < 0.90  # 85 % by the docstring
    assert 0.42 < num_speeds / (num_with_motion * num_digits) < 0.58  # and half of those name the speed


def test_every_phrase_of_the_grammar_is_read():
    speed_words = [(speed, word) for speed, group in SPEED_WORDS.items() for word in group]
    for octant, group in enumerate(DIRECTION_PHRASES):
        for phrase, (speed, word) in itertools.product(group, speed_words):
            other = (octant + 3) % 8
            caption = f"A 7 moving {phrase} {word}, and the digit {DIGIT_WORDS[2]} drifting {DIRECTION_PHRASES[other][0]}!"
            assert parse_caption(caption) == CaptionFacts((7, 2), (octant, other), (speed, None)), caption


@pytest.mark.parametrize(("prompt", "facts"), [
    ("", CaptionFacts((), (), ())),
    ("moving up slowly", CaptionFacts((), (), ())),
    ("two handwritten digits 3 and two", CaptionFacts((3, 2), (None, None), (None, None))),
    ("A HANDWRITTEN 5 Moving Up And To The Left", CaptionFacts((5,), (3,), (None,))),
])
def test_free_text_is_read_too(prompt, facts):
    assert parse_caption(prompt) == facts


def test_captions_are_a_function_of_the_generator_and_vary():
    facts = [MotionFacts(4, 1, "fast")]
    captions = [[compose_caption(facts, rng) for _ in range(50)] for rng in (np.random.default_rng(0), np.random.default_rng(0))]
    assert captions[0] == captions[1] and len(set(captions[0])) > 25


def test_the_null_prompt_is_one_token(small_text_encoder):
    tokens = tokenize_without_warning(small_text_encoder, [NULL_PROMPT, "  \n", "a 3"])
    assert tokens[:2, 0].tolist() == [START_TOKEN] * 2 and (tokens[:2, 1:] == PAD_TOKEN).all()
    embedding, mask = small_text_encoder(tokens)
    assert mask.sum(1).tolist() == [1, 1, 3]
    assert embedding[:, 0].any(dim=1).all() and not embedding[~mask].any()


def test_each_word_has_its_own_token(small_text_encoder):
    encoder = TextEncoder(TextEncoderConfig(width=32, max_tokens=len(VOCABULARY) + 1))
    tokens = encoder.tokenize([" ".join(VOCABULARY)])[0].tolist()
    assert sorted(tokens) == list(range(1, len(VOCABULARY) + NUM_SPECIAL_TOKENS))
    spellings = small_text_encoder.tokenize(["the 3, moving UP!", "The 3 moving up", "the3moving\tup"])
    assert torch.equal(spellings[0], spellings[1]) and torch.equal(spellings[1], spellings[2])


def test_unknown_words_are_named_once_and_left_out(small_text_encoder):
    with pytest.warns(UserWarning, match="unknown words left out") as caught:
        tokens = small_text_encoder.tokenize(["a purple 3", "a zebra moving up", "a purple 4"])
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.count("purple") == 1 and message.count("zebra") == 1 and "\n" not in message
    assert all(word in message for word in VOCABULARY)
    assert torch.equal(tokens, small_text_encoder.tokenize(["a 3", "a moving up", "a 4"]))


def test_long_prompts_are_cut_with_a_warning(small_text_encoder):
    fits = " ".join(["up"] * 11)
    expected = tokenize_without_warning(small_text_encoder, [fits])
    with pytest.warns(UserWarning, match="1 prompts are longer than 11 words") as caught:
        tokens = small_text_encoder.tokenize([fits + " down", "a 3"])
    assert len(caught) == 1 and torch.equal(tokens[:1], expected)


@pytest.mark.parametrize("with_gradient", [False, True])  # without gradient torch takes another kernel
def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(small_text_encoder, with_gradient):
    prompts = ["", "a 3 moving up", "the digit 4 drifting down and to the left slowly", "digits 1 and 2"]
    with torch.set_grad_enabled(with_gradient):
        together, mask = small_text_encoder.encode(prompts)
        for i, prompt in enumerate(prompts):
            alone, alone_mask = small_text_encoder.encode([prompt])
            assert torch.equal(alone_mask[0], mask[i])
            torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_words_do_not_attend_to_padding(small_text_encoder):
    before, mask = small_text_encoder.encode(["a 3 moving up"])
    small_text_encoder.position_embedding[5:] += torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    assert mask.sum() == 5
    torch.testing.assert_close(small_text_encoder.encode(["a 3 moving up"])[0], before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("sizes", "message"), [
    ({"width": 48}, r"text\.width is 48: expected a positive multiple of 32"),
    ({"max_tokens": 1}, r"text\.max_tokens is 1: expected at least 2"),
])
def test_impossible_sizes_are_refused_by_name(sizes, message):
    with pytest.raises(ValueError, match=message):
        TextEncoderConfig(**sizes)
