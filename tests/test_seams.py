"""A prompt's ids from those of the whole text are what the tokenizer gives for the prompt alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_families import FAMILIES, Family, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from training.data.seams import last_seam, prompt_within
from training.data.tokens import text_ids

ANSWERS = ("12", " 12", "\n12", "", "é<|", "  two\nlines \n")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_of_real_templates(family: Family, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(family, tmp_path)
    turns = [{"role": "user", "content": "What is 3+4?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert isinstance(prompt, str)
    for answer in ANSWERS:
        expect_same(tokenizer, prompt, answer)


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(max_size=40), answer=st.text(max_size=20), places=st.lists(st.integers(0, 40), max_size=4))
def test_of_any_text_between_special_tokens(tiny_model: Path, prompt: str, answer: str, places: list[int]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for place in places:
        prompt = prompt[:place] + "<|im_end|>" + prompt[place:]
    expect_same(tokenizer, prompt, answer)


def expect_same(tokenizer: object, prompt: str, answer: str) -> None:
    seam = last_seam(tokenizer, prompt)  # type: ignore[arg-type]
    if seam is not None:
        found = prompt_within(tokenizer, seam, prompt + answer, text_ids(tokenizer, prompt + answer))  # type: ignore[arg-type]
        assert found is None or found == text_ids(tokenizer, prompt)  # type: ignore[arg-type]


def test_the_packaged_form_of_prompt_has_a_seam(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    seam = last_seam(tokenizer, prompt)
    assert seam is not None
    assert (seam.count, seam.tail) == (3, "<|im_start|>assistant\n")
    ids = text_ids(tokenizer, f"{prompt}yes<|im_end|>")
    assert prompt_within(tokenizer, seam, f"{prompt}yes<|im_end|>", ids) == text_ids(tokenizer, prompt)
