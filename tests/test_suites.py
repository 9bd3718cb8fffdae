"""Suites' items: how they are rendered, and which of their ids are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import END, START, make_tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from training.data.encoding import encode
from training.data.items import SuiteItem
from training.data.rows import Conversation
from training.evaluation.suites import encode_item, render_item
from training.spec import Accuracy, CrossEntropy, ExactMatch

ITEM = SuiteItem("what is 3+4", "7", "f row 1", system="You add.", choices=("8", "7"), right=1)
HEAD = f"{START}system\nYou add.{END}\n{START}user\nwhat is 3+4{END}\n{START}assistant\n"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()


def exact(**fields: Any) -> ExactMatch:
    return ExactMatch(name="s", path=Path("f"), metric="exact_match", prompt="q", completion="a", **fields)


def test_chat_and_plain_items_are_rendered(tokenizer: PreTrainedTokenizerFast) -> None:
    chat, plain = render_item(exact(), ITEM, tokenizer), render_item(exact(chat=False), ITEM, tokenizer)
    assert (chat.prompt, chat.target, chat.choices) == (HEAD, "7", ("8", "7"))
    assert (plain.prompt, plain.target, plain.choices) == ("You add.\nwhat is 3+4", " 7", (" 8", " 7"))


def test_an_exact_match_item_is_encoded_as_a_training_row(tokenizer: PreTrainedTokenizerFast) -> None:
    system, prompt = {"role": "system", "content": "You add."}, {"role": "user", "content": "what is 3+4"}
    row = Conversation((system, prompt, {"role": "assistant", "content": "7"}), "")
    for chat in (True, False):
        assert encode_item(exact(chat=chat), ITEM, tokenizer, 200) == encode(tokenizer, row, chat)


def test_a_scored_answer_carries_no_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    suite = Accuracy(name="s", path=Path("f"), metric="accuracy", prompt="q", choices="c", answer="a")
    example = encode_item(suite, ITEM, tokenizer, 200)
    targets = [token for token, is_target in zip(example.ids, example.is_target, strict=True) if is_target]
    assert tokenizer.decode(targets) == " 7"


def test_plain_text_is_scored_from_its_first_token_after_one_start_token(tokenizer: PreTrainedTokenizerFast) -> None:
    suite = CrossEntropy(name="s", path=Path("f"), metric="cross_entropy", text="t")
    example = encode_item(suite, SuiteItem("", "abc", "f row 1"), tokenizer, 200)
    assert tokenizer.decode(list(example.ids)) == f"{START}abc"
    assert example.is_target == (False, True, True, True)


def test_a_long_item_keeps_its_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode_item(exact(chat=False), ITEM, tokenizer, 6)
    assert tokenizer.decode(list(example.ids)) == f"3+4 7{END}"
    assert example.is_target == (False, False, False, True, True, True)
