"""Token ids and loss masks: what is learned, and that prompts are tokenised as serving does."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from tiny import END, PAD, START, make_tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import training.data.rendering
from training.data.chat import rendered_ahead
from training.data.encoding import (
    Encoded,
    Untaught,
    encode,
    encode_all,
    encode_many,
    encode_passages,
    encode_preferences,
    load_tokenizer,
    preview,
    wants_chat,
)
from training.data.rendering import render_prompt
from training.data.rows import Conversation, Faults, Passage, Preference
from training.errors import TenureError
from training.section import Learn

LEARNS: tuple[Learn, ...] = get_args(Learn)

SINGLE = Conversation(({"role": "user", "content": "what is 3+4"}, {"role": "assistant", "content": "7"}), "f row 1")
MULTI = Conversation(
    (
        {"role": "system", "content": "You add."},
        {"role": "user", "content": "3+4?"},
        {"role": "assistant", "content": "It is 7.\n"},
        {"role": "user", "content": "and 1?"},
        {"role": "assistant", "content": "8"},
    ),
    "f row 2",
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()


@pytest.fixture
def starting() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a start token before every text, and an end token after it."""
    made = make_tiny_tokenizer()
    pairs = [(token, made.convert_tokens_to_ids(token)) for token in (START, END)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=f"{START} $A {END}", special_tokens=pairs)
    assert made("a")["input_ids"] == [pairs[0][1], *made("a", add_special_tokens=False)["input_ids"], pairs[1][1]]
    return made


def test_a_single_turn_carries_loss_on_the_answer_and_its_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert preview(tokenizer, encode(tokenizer, SINGLE, chat=True)) == [
        (f"{START}user\nwhat is 3+4{END}\n{START}assistant\n", False),
        (f"7{END}", True),
    ]


def test_every_assistant_turn_carries_loss_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    assert preview(tokenizer, encode(tokenizer, MULTI, chat=True)) == [
        (f"{START}system\nYou add.{END}\n{START}user\n3+4?{END}\n{START}assistant\n", False),
        (f"It is 7.\n{END}", True),
        (f"\n{START}user\nand 1?{END}\n{START}assistant\n", False),
        (f"8{END}", True),
    ]


def test_a_preview_joins_to_the_row_where_a_cut_falls_into_a_character(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tuple(tokenizer(" a\N{EURO SIGN} b", add_special_tokens=False)["input_ids"])
    for cut in range(1, len(ids)):
        found = preview(tokenizer, Encoded(ids, (False,) * cut + (True,) * (len(ids) - cut)))
        assert "".join(text for text, _ in found) == " a\N{EURO SIGN} b"
        assert [is_target for _, is_target in found] == [False, True]


@pytest.mark.parametrize(
    ("prompt", "answer", "target"),
    [("what is 3+4", "7", " 7"), ("what is 3+4\n", "7", "7"), ("what is 3+4", "\n7", "\n7"), ("", "7", "7")],
)
def test_a_plain_answer_is_parted_from_its_prompt_by_one_space(
    tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str, target: str
) -> None:
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    found = preview(tokenizer, encode(tokenizer, Conversation(turns, ""), chat=False))
    assert found == [(prompt, False)] * bool(prompt) + [(f"{target}{END}", True)]


def test_prompt_ids_are_those_that_serving_gives_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    for conversation in (SINGLE, MULTI):
        for index, turn in enumerate(conversation.messages):
            if turn["role"] == "assistant":
                served = tokenizer.apply_chat_template(
                    list(conversation.messages[:index]), add_generation_prompt=True, tokenize=True, return_dict=False
                )
                assert list(encode(tokenizer, conversation, chat=True).ids[: len(served)]) == served


def test_an_added_start_token_comes_once_before_plain_prompts_and_never_before_chat(
    starting: PreTrainedTokenizerFast,
) -> None:
    assert preview(starting, encode(starting, SINGLE, chat=False)) == [
        (f"{START}what is 3+4", False),
        (f" 7{END}", True),
    ]
    served = starting.apply_chat_template(
        list(SINGLE.messages[:1]), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    chat = encode(starting, SINGLE, chat=True)
    assert list(chat.ids[: len(served)]) == served
    assert preview(starting, chat)[0][0].count(START) == 2  # one a turn: the template's own


def test_what_a_template_writes_after_the_end_token_is_not_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("'\\n' }}{% endfor", "'\\n-- next --\\n' }}{% endfor")
    assert preview(tokenizer, encode(tokenizer, SINGLE, chat=True))[-1] == (f"7{END}", True)


def dropping(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer whose template leaves out what the assistant said before."""
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}" + turn + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode(dropping(tokenizer), SINGLE, chat=True).num_targets == 2
    told = r"rewrites earlier turns: 'assistan' in the row of one answer is 'user\\nand' in the prompt of the next"
    with pytest.raises(TenureError, match=told) as caught:
        encode(tokenizer, MULTI, chat=True)
    assert caught.value.problems[0].where == "f row 2"
    assert "learn: each" in caught.value.problems[0].instead


@pytest.mark.parametrize("drops", [False, True])
def test_the_last_turn_alone_is_learned_or_each_in_a_row_of_its_own(
    tokenizer: PreTrainedTokenizerFast, drops: bool
) -> None:
    used = dropping(tokenizer) if drops else tokenizer
    middle = "" if drops else f"{START}assistant\nIt is 7.\n{END}\n"
    first = f"{START}system\nYou add.{END}\n{START}user\n3+4?{END}\n"
    asked, ended = f"{START}user\nand 1?{END}\n{START}assistant\n", [(f"8{END}", True)]
    (last,), _ = encode_all(used, [replace(MULTI, learn="last")], True, 4096, "refuse")
    assert preview(used, last) == [(first + middle + asked, False), *ended]
    rows, _ = encode_all(used, [SINGLE, replace(MULTI, learn="each")], True, 4096, "refuse")
    assert [preview(used, row) for row in rows[1:]] == [
        [(first + f"{START}assistant\n", False), (f"It is 7.\n{END}", True)],
        preview(used, last),
    ]


def test_a_turn_of_weight_0_is_read_and_not_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = tuple(turn | {"weight": 0} if turn["content"] == "8" else turn for turn in MULTI.messages)
    assert preview(tokenizer, encode(tokenizer, replace(MULTI, messages=turns), chat=True)) == [
        (f"{START}system\nYou add.{END}\n{START}user\n3+4?{END}\n{START}assistant\n", False),
        (f"It is 7.\n{END}", True),
    ]
    for learn in LEARNS:
        unlearned = replace(SINGLE, messages=turns[3:], where="f row 2", learn=learn)
        with pytest.raises(TenureError, match="f row 2: no target token is left to learn"):
            encode_all(tokenizer, [SINGLE, unlearned], True, 4096, "refuse")
        untaught = Untaught(drop=True)
        kept, _ = encode_all(tokenizer, [SINGLE, unlearned], True, 4096, "refuse", untaught)
        assert (kept, untaught.count) == ([encode(tokenizer, SINGLE, chat=True)], 1)


def merging(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with one token for two line ends, as those of real models have."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["\u010a\u010a"] = len(tokenizer)
    state["pre_tokenizer"]["use_regex"] = False
    state["model"]["merges"] = [["\u010a", "\u010a"]]
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END)
    made.chat_template = tokenizer.chat_template
    return made


def test_an_answer_that_would_melt_into_its_prompt_is_encoded_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    used = merging(tokenizer)
    ask = {"role": "user", "content": "3+4?"}
    row = Conversation((ask, {"role": "assistant", "content": "\n7"}), "f row 1")
    encoded = encode(used, row, chat=True)
    served = used.apply_chat_template([ask], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(encoded.ids[: len(served)]) == served
    assert preview(used, encoded)[-1] == (f"\n7{END}", True)
    again = Conversation((*row.messages, *SINGLE.messages), "f row 2")
    with pytest.raises(TenureError, match="f row 2: the chat template rewrites earlier turns"):
        encode(used, again, chat=True)
    assert len(encode_all(used, [replace(again, learn="each")], True, 4096, "refuse")[0]) == 2


def test_the_templates_own_marks_narrow_what_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    """Here they leave out the first word, and the end token, which is learned all the same."""
    said = "{{ message['content'] + '<|im_end|>' }}"
    words = "{% set parts = message['content'].partition(' ') %}{{ parts[0] + parts[1] }}"
    marked = words + "{% generation %}{{ parts[2] }}{% endgeneration %}{{ '<|im_end|>' }}"
    bare = tokenizer.chat_template.replace("{% generation %}" + said + "{% endgeneration %}", marked)
    assert bare != tokenizer.chat_template
    tokenizer.chat_template = bare
    turns = ({"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "It is 7."})
    found = preview(tokenizer, encode(tokenizer, Conversation(turns, ""), chat=True))
    assert found == [(f"{START}user\n3+4?{END}\n{START}assistant\nIt ", False), (f"is 7.{END}", True)]


def test_a_space_that_is_put_before_a_first_word_is_not_put_before_an_answer() -> None:
    """SentencePiece's, as in Llama 2 and Mistral: the prompt brings the space, or there is none."""
    letters = {letter: place for place, letter in enumerate("\u2581abq7\n")}
    backend = Tokenizer(models.BPE(vocab={**letters, "\u25817": 6}, merges=[("\u2581", "7")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "7"})
    ids = encode(made, Conversation(turns, ""), chat=False).ids
    assert list(ids) == [*made("q 7", add_special_tokens=False)["input_ids"], made.eos_token_id]


def test_turns_that_a_template_refuses_are_told_with_its_words(tokenizer: PreTrainedTokenizerFast) -> None:
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    assert encode(tokenizer, SINGLE, chat=True).num_targets == 2
    told = "f row 2: the model's chat template refuses the turns system, user: no system turns"
    with pytest.raises(TenureError, match=told):
        encode(tokenizer, MULTI, chat=True)
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(TenureError, match="the model's chat template refuses"):
        encode(tokenizer, SINGLE, chat=True)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        (ENDLESS, "it has not come to an end in 0.2 seconds"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' of 'list' object is unsafe"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[0].text.first }}", "has no attribute 'text'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "maximum recursion depth exceeded"),
        ("{{ [].append(1) }}", "is not safely callable|unsafe"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_told_by_row(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    monkeypatch.setattr(training.data.rendering, "RENDER_LIMIT_S", 0.2)
    tokenizer.chat_template = template
    rows = [SINGLE, replace(SINGLE, where="f row 3")]
    with pytest.raises(
        TenureError, match=f"f row 1: the model's chat template refuses the turns user: .*({reason})"
    ) as caught:
        encode_all(tokenizer, rows, True, 4096, "refuse")
    assert [problem.where for problem in caught.value.problems] == ["f row 1", "f row 3"]


def test_a_template_whose_end_does_not_stop_the_model_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    end = tokenizer.eos_token_id
    tokenizer.eos_token = PAD
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    tokenizer.save_pretrained(tmp_path / "a")
    told = f"the chat template ends turns with {END}, at which the model does not stop".replace("|", r"\|")
    with pytest.raises(TenureError, match=told) as caught:
        encode_all(load_tokenizer(tmp_path / "a"), [SINGLE, MULTI], True, 4096, "refuse")
    (problem,) = caught.value.problems  # one for the model, not one a row
    assert (problem.where, f"add its id {end} to eos_token_id" in problem.instead) == (str(tmp_path / "a"), True)
    for name, stops in (("generation_config.json", [end]), ("config.json", end)):
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / name).write_text(json.dumps({"eos_token_id": stops}))
        stopping = load_tokenizer(tmp_path / name)
        assert preview(stopping, encode(stopping, SINGLE, chat=True))[-1] == (f"7{END}", True)


def test_an_answer_that_goes_on_after_its_end_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = ({"role": "user", "content": "3+4?"}, {"role": "assistant", "content": f"7{END} and more"})
    with pytest.raises(TenureError, match=r"f row 1: an answer goes on after <\|im_end\|>, at which serving stops"):
        encode(tokenizer, Conversation(turns, "f row 1"), chat=True)
    once = ({"role": "user", "content": "3+4?"}, {"role": "assistant", "content": f"7{END}"})
    assert preview(tokenizer, encode(tokenizer, Conversation(once, ""), chat=True))[-1] == (f"7{END}", True)


def test_an_answer_that_the_template_does_not_end_gets_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    found = preview(tokenizer, encode(tokenizer, SINGLE, chat=True))
    assert found == [("user: what is 3+4\n", False), (f"assistant: 7\n{END}", True)]


ASK, ANSWER = SINGLE.messages


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ((ASK, ANSWER, ASK), "the last turn is the user's: nothing to learn"),
        ((ASK, ANSWER | {"content": " "}, ASK, ANSWER), "the assistant's turn 2 is empty"),
        ((ANSWER, ASK, ANSWER), "the first turn is the assistant's"),
    ],
)
def test_turns_that_teach_nothing_are_told_by_row(
    tokenizer: PreTrainedTokenizerFast, turns: tuple[dict[str, Any], ...], what: str
) -> None:
    for learn in LEARNS:
        if learn != "last" or turns[-1] != ANSWER:
            with pytest.raises(TenureError, match=f"f row 1: {what}"):
                encode_all(tokenizer, [Conversation(turns, "f row 1", learn=learn)], True, 4096, "refuse")


def test_chat_needs_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    assert wants_chat("auto", tokenizer, "f")
    assert not wants_chat(False, tokenizer, "f")
    tokenizer.chat_template = None
    assert not wants_chat("auto", tokenizer, "f")
    with pytest.raises(TenureError, match="f: chat is asked for, but the model has no chat template"):
        wants_chat(True, tokenizer, "f")


def of_lengths(*answers: int) -> list[Conversation]:
    """Plain conversations with answers of so many characters, which are tokens."""
    return [
        Conversation(({"role": "user", "content": "q\n"}, {"role": "assistant", "content": "x" * count}), f"f row {n}")
        for n, count in enumerate(answers, start=1)
    ]


def test_overlong_rows_are_refused_dropped_or_truncated_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = of_lengths(3, 7, 8, 20)  # 2 + answer + end token: 6, 10, 11, 23
    with pytest.raises(TenureError) as caught:
        encode_all(tokenizer, rows, chat=False, max_length=10, overlong="refuse")
    (problem,) = caught.value.problems
    assert problem.where == "f row 3"
    assert problem.what == "2 rows are longer than max_length 10 (the longest has 23 tokens)"
    assert "training.max_length: 23" in problem.instead
    dropped, count = encode_all(tokenizer, rows, chat=False, max_length=10, overlong="drop")
    assert ([len(example.ids) for example in dropped], count) == ([6, 10], 2)
    cut, count = encode_all(tokenizer, rows, chat=False, max_length=10, overlong="truncate")
    assert ([len(example.ids) for example in cut], count) == ([6, 10, 10, 10], 2)
    assert [example.num_targets for example in cut] == [4, 8, 8, 8]
    whole, count = encode_all(tokenizer, rows, chat=False, max_length=23, overlong="refuse")
    assert ([len(example.ids) for example in whole], count) == ([6, 10, 11, 23], 0)


def test_rows_whose_answer_is_cut_away_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TenureError, match=r"f row 1: no target token is left to learn \(2 rows like this\)"):
        encode_all(tokenizer, of_lengths(3, 4), chat=False, max_length=2, overlong="truncate")


def test_rows_and_pairs_without_targets_are_dropped_and_counted_where_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    long = Conversation(({"role": "user", "content": "q" * 9}, {"role": "assistant", "content": "7"}), "f row 1")
    untaught = Untaught(drop=True)
    kept, longer = encode_all(tokenizer, [long, *of_lengths(3)], False, 8, "truncate", untaught)
    assert ([row.num_targets for row in kept], longer, untaught.count) == ([4], 1, 1)
    pairs = [Preference(long, replace(long, messages=SINGLE.messages)), preference("xx", "yy")]
    chosen, rejected, longer = encode_preferences(tokenizer, pairs, False, 8, "truncate", untaught)
    assert (len(chosen), len(rejected), longer, untaught.count) == (1, 1, 1, 2)


def test_the_first_token_is_no_target(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = Conversation(({"role": "user", "content": ""}, {"role": "assistant", "content": "7"}), "f row 1")
    example = encode(tokenizer, bare, chat=False)
    assert (len(example.ids), example.num_targets) == (2, 1)


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 16, 17, 40])
@pytest.mark.parametrize("starts", [False, True])
def test_a_text_is_cut_into_pieces_that_learn_every_token_once(
    tokenizer: PreTrainedTokenizerFast, starting: PreTrainedTokenizerFast, length: int, starts: bool
) -> None:
    used = starting if starts else tokenizer
    text = "".join(chr(ord("a") + index % 26) for index in range(length))
    pieces, num_cut = encode_passages(used, [Passage(text, "f row 1")], max_length=9)
    whole = [*([used.bos_token_id] if starts else []), *used(text, add_special_tokens=False)["input_ids"]]
    whole.append(used.eos_token_id)
    learned = [token for piece in pieces for token, wanted in zip(piece.ids, piece.is_target, strict=True) if wanted]
    assert learned == whole[1:]
    assert pieces[0].ids[0] == whole[0]
    assert all(2 <= len(piece.ids) <= 9 and piece.num_targets == len(piece.ids) - 1 for piece in pieces)
    assert all(after.ids[0] == before.ids[-1] for before, after in itertools.pairwise(pieces))
    assert num_cut == (len(whole) > 9)


def test_pieces_of_one_token_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TenureError, match="f row 1: a piece of one token has nothing to learn"):
        encode_passages(tokenizer, [Passage("ab", "f row 1")], max_length=1)


def preference(chosen: str, rejected: str, place: int = 1) -> Preference:
    prompt = {"role": "user", "content": "q\n"}
    answers = ((prompt, {"role": "assistant", "content": answer}) for answer in (chosen, rejected))
    return Preference(*(Conversation(turns, f"f row {place}") for turns in answers))


@pytest.mark.parametrize("chat", [False, True])
def test_a_pair_is_its_two_conversations(tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
    pair = preference("yes", "no")
    chosen, rejected, longer = encode_preferences(tokenizer, [pair], chat, 64, "refuse")
    assert chosen == [encode(tokenizer, pair.chosen, chat)]
    assert rejected == [encode(tokenizer, pair.rejected, chat)]
    assert (longer, chosen[0].num_targets, rejected[0].num_targets) == (0, 4, 3)


def test_a_pair_is_overlong_when_either_answer_is(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [preference("xx", "y" * 9, 1), preference("xx", "yy", 2), preference("x" * 20, "y", 3)]
    with pytest.raises(TenureError) as caught:
        encode_preferences(tokenizer, pairs, False, 10, "refuse")
    assert caught.value.problems[0].what == "2 rows are longer than max_length 10 (the longest has 23 tokens)"
    chosen, rejected, longer = encode_preferences(tokenizer, pairs, False, 10, "drop")
    assert (len(chosen), len(rejected), longer) == (1, 1, 2)
    chosen, rejected, longer = encode_preferences(tokenizer, pairs, False, 10, "truncate")
    assert ([len(row.ids) for row in chosen], [len(row.ids) for row in rejected], longer) == ([5, 5, 10], [10, 5, 4], 2)
    assert [row.num_targets for row in chosen] == [3, 3, 8], "the ends of the answers are cut"


def test_a_pair_that_differs_only_where_it_was_cut_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TenureError, match="f row 1: the chosen and the rejected answer are the same tokens"):
        encode_preferences(tokenizer, [preference("x" * 9 + "a", "x" * 9 + "b")], False, 10, "truncate")


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(tmp_path: Path) -> None:
    made = make_tiny_tokenizer()
    made.pad_token = None
    made.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == made.eos_token_id


def test_a_rendered_prompt_ends_with_the_assistants_header(tokenizer: PreTrainedTokenizerFast) -> None:
    assert render_prompt(tokenizer, SINGLE.messages[:1], "") == f"{START}user\nwhat is 3+4{END}\n{START}assistant\n"


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", None), ("tokenizer.json", "{"), ("tokenizer.json", "{}")]
)
def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path, name: str, text: str | None) -> None:
    make_tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(TenureError, match="the tokenizer cannot be read: "):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    made = make_tiny_tokenizer()
    made.eos_token = None
    made.save_pretrained(tmp_path)
    with pytest.raises(TenureError, match="the tokenizer has no end token"):
        load_tokenizer(tmp_path)


def test_rows_rendered_together_are_what_each_is_by_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    refuse = "{% if messages[0].content == 'no' %}{{ raise_exception('no such word') }}{% endif %}"
    tokenizer.chat_template = refuse + str(tokenizer.chat_template)
    rows = [replace(MULTI if place % 3 else SINGLE, where=f"f row {place}") for place in range(150)]
    rows[70] = replace(SINGLE, messages=({"role": "user", "content": "no"}, SINGLE.messages[1]), where="f row 70")
    faults = Faults(drop=True)
    single, multi = (encode(tokenizer, row, chat=True) for row in (SINGLE, MULTI))
    expected = [None if place == 70 else multi if place % 3 else single for place in range(150)]
    assert encode_many(tokenizer, rows, True, faults) == expected
    assert [problem.where for problem in faults.first] == ["f row 70"]
    left_out = [place for place, texts in enumerate(rendered_ahead(tokenizer, rows)) if not texts]
    assert 70 in left_out
    assert len(left_out) < 64
