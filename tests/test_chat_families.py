"""Training ids equal serving ids, token by token, for the templates of real models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_families import FAMILIES, LATER, MARKED, SAID, THINK, Family, tokenizer_of
from transformers import PreTrainedTokenizerFast

from training.data.encoding import encode, encode_all, load_tokenizer, preview
from training.data.rows import Conversation, Learn
from training.errors import TenureError

ASK = {"role": "user", "content": "What is 3+4?"}
AGAIN = {"role": "user", "content": "and 1?"}
SYSTEM = {"role": "system", "content": "You add."}
BY_NAME = {family.name: family for family in FAMILIES}
STEADY = [family.name for family in FAMILIES if not family.rewrites]


def says(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def talk(*turns: dict[str, Any], learn: Learn = "all") -> Conversation:
    return Conversation(turns, "f row 1", learn=learn)


def served(
    tokenizer: PreTrainedTokenizerFast, turns: tuple[dict[str, Any], ...], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """The ids that a server computes for turns that it is to answer."""
    ids = tokenizer.apply_chat_template(
        list(turns), tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert isinstance(ids, list)
    return ids


def written(family: Family, tokenizer: PreTrainedTokenizerFast, content: str) -> list[int]:
    """The ids that a model of the family has to write, its end token among them."""
    text = family.expected(content).removeprefix("<think>\n" if family.thought else "")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("content", [SAID, "  two\nlines \n"])
@pytest.mark.parametrize("before", [(ASK,), (SYSTEM, ASK), (ASK, says(SAID), AGAIN), (SYSTEM, ASK, says(SAID), AGAIN)])
def test_the_last_answer_stands_after_the_prompt_that_serving_sees(
    tmp_path: Path, name: str, content: str, before: tuple[dict[str, Any], ...]
) -> None:
    family = BY_NAME[name]
    if before[0] is SYSTEM and not family.system:
        pytest.skip("the template takes no system turn")
    tokenizer = tokenizer_of(family, tmp_path)
    given = family.thought + content
    prompt, answer = served(tokenizer, before), written(family, tokenizer, given)
    encoded = encode(tokenizer, talk(*before, says(given), learn="last"), chat=True)
    assert list(encoded.ids) == prompt + answer
    assert list(encoded.is_target) == [False] * len(prompt) + [True] * len(answer)


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("contents", [(SAID, LATER), (" 7 ", "\n8\n", "<9>")])
def test_every_answer_of_a_row_stands_after_the_prompt_that_serving_sees(
    tmp_path: Path, name: str, contents: tuple[str, ...]
) -> None:
    family = BY_NAME[name]
    tokenizer = tokenizer_of(family, tmp_path)
    turns = tuple(turn for content in contents for turn in (ASK, says(content)))
    encoded = encode(tokenizer, talk(*turns), chat=True)
    wanted = [False] * len(encoded.ids)
    for place, content in enumerate(contents):
        prompt, answer = served(tokenizer, turns[: 2 * place + 1]), written(family, tokenizer, content)
        assert list(encoded.ids[: len(prompt) + len(answer)]) == prompt + answer
        wanted[len(prompt) : len(prompt) + len(answer)] = [True] * len(answer)
    assert list(encoded.is_target) == wanted
    assert wanted[-1]


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in STEADY])
def test_a_row_whose_earlier_answers_serving_rewrites_is_refused_and_each_answer_learned_by_itself(
    tmp_path: Path, name: str
) -> None:
    family = BY_NAME[name]
    tokenizer = tokenizer_of(family, tmp_path)
    contents = [family.thought + content for content in (SAID, LATER)]
    turns = (ASK, says(contents[0]), AGAIN, says(contents[1]))
    with pytest.raises(TenureError, match=r"(?s)^f row 1: the chat template rewrites earlier turns: .* learn: each"):
        encode(tokenizer, talk(*turns), chat=True)
    rows, _ = encode_all(tokenizer, [talk(*turns, learn="each")], True, 4096, "refuse")
    assert [list(row.ids) for row in rows] == [
        served(tokenizer, turns[:1]) + written(family, tokenizer, contents[0]),
        served(tokenizer, turns[:3]) + written(family, tokenizer, contents[1]),
    ]


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("before", [(ASK,), (ASK, says("  one "), AGAIN), (SYSTEM, ASK, says(SAID), AGAIN)])
def test_marked_spans_are_what_the_prefixes_tell(tmp_path: Path, name: str, before: tuple[dict[str, Any], ...]) -> None:
    """The same template with marks gives the same ids; its marks are our targets and, beyond them, white space."""
    family = BY_NAME[name]
    if before[0] is SYSTEM and not family.system:
        pytest.skip("the template takes no system turn")
    plain = tokenizer_of(family, tmp_path / "plain")
    marked = tokenizer_of(family, tmp_path / "marked", family.template("_marked"))
    row = talk(*before, says(SAID))
    told, encoded = encode(plain, row, chat=True), encode(marked, row, chat=True)
    assert encoded == told
    raw = marked.apply_chat_template(list(row.messages), return_assistant_tokens_mask=True, return_dict=True)
    masks, ids = list(raw["assistant_masks"]), list(raw["input_ids"])
    assert ids[: len(told.ids)] == list(told.ids)
    beyond = [token for token, mine, theirs in zip(ids, told.is_target, masks, strict=False) if theirs and not mine]
    assert all(mine <= theirs for mine, theirs in zip(told.is_target, masks, strict=False))
    assert not str(plain.decode(beyond)).strip()


@pytest.mark.parametrize("name", BY_NAME)
def test_no_start_token_is_doubled(tmp_path: Path, name: str) -> None:
    family = BY_NAME[name]
    tokenizer = tokenizer_of(family, tmp_path)
    ids = encode(tokenizer, talk(ASK, says(family.thought + SAID)), chat=True).ids
    assert list(ids).count(tokenizer.convert_tokens_to_ids(family.bos)) <= 1


@pytest.mark.parametrize("name", ["qwen3", "lfm2_2_5", "glm4moe", "phi3_5"])
def test_the_artifact_gets_the_template_that_serves(tmp_path: Path, name: str) -> None:
    """Encoding leaves the tokenizer as it was, and the artifact's copy renders and encodes as the base's."""
    family = BY_NAME[name]
    tokenizer_of(family, tmp_path / "base")
    tokenizer, row = load_tokenizer(tmp_path / "base"), talk(ASK, says(SAID))
    before = encode(tokenizer, row, chat=True)
    tokenizer.save_pretrained(tmp_path / "artifact")
    shutil.copy(tmp_path / "base" / "generation_config.json", tmp_path / "artifact")
    assert (tmp_path / "artifact" / "chat_template.jinja").read_text(encoding="utf-8") == family.template()
    assert encode(load_tokenizer(tmp_path / "artifact"), row, chat=True) == before


def test_reasoning_is_learned_where_the_template_writes_it(tmp_path: Path) -> None:
    thought = says("7") | {"reasoning_content": "3 and 4"}
    shown = {
        "qwen3": "<think>\n3 and 4\n</think>\n\n7<|im_end|>",
        "qwen3_5_think": "3 and 4\n</think>\n\n7<|im_end|>",
        "glm4moe": "\n<think>3 and 4</think>\n7<|user|>",
        "gptoss": "<|channel|>analysis<|message|>3 and 4<|end|><|start|>assistant"
        "<|channel|>final<|message|>7<|return|>",
    }
    for name, answer in shown.items():
        tokenizer = tokenizer_of(BY_NAME[name], tmp_path / name)
        assert preview(tokenizer, encode(tokenizer, talk(ASK, thought), chat=True))[-1] == (answer, True)
    for name in ("llama3", "deepseek_r1_distill", "qwen2_5"):
        tokenizer = tokenizer_of(BY_NAME[name], tmp_path / name)
        with pytest.raises(TenureError, match="f row 1: the model's chat template leaves out reasoning_content"):
            encode(tokenizer, talk(ASK, thought), chat=True)


def test_an_answer_that_does_not_start_as_serving_starts_it_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(BY_NAME["deepseek_r1_distill"], tmp_path)
    with pytest.raises(TenureError, match=r"serving starts the assistant's turn 2 with '<think>\\n', which"):
        encode(tokenizer, talk(ASK, says("7")), chat=True)


TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "description": "one"}, "b": {"type": "integer"}},
                "required": ["a"],
            },
        },
    },
)
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOLD = {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "7"}
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>'
LLAMA_CALL = '{"name": "add", "parameters": {"a": 3, "b": 4}}<|eot_id|>'
GLM_ARGUMENTS = "<arg_key>a</arg_key>\n<arg_value>3</arg_value>\n<arg_key>b</arg_key>\n<arg_value>4</arg_value>\n"
QWEN3_5_CALL = "<function=add>\n<parameter=a>\n3\n</parameter>\n<parameter=b>\n4\n</parameter>\n</function>\n"
CALLED = {
    "qwen2_5": QWEN_CALL,
    "qwen3": THINK + QWEN_CALL,
    "qwen3_instruct_2507": QWEN_CALL,
    "qwen3_5_think": f"\n</think>\n\n<tool_call>\n{QWEN3_5_CALL}</tool_call><|im_end|>",
    "llama3_1": LLAMA_CALL,
    "llama3_2": LLAMA_CALL,
    "lfm2_2_5": "<|tool_call_start|>[add(a=3, b=4)]<|tool_call_end|><|im_end|>",
    "glm4moe": f"\n<think></think>\n<tool_call>add\n{GLM_ARGUMENTS}</tool_call><|observation|>",
    "gptoss": ' to=functions.add<|channel|>commentary json<|message|>{"a": 3, "b": 4}<|call|>',
    "mistral_v2v3": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 3, "b": 4}, "id": "abcdefghi"}]</s>',
}


@pytest.mark.parametrize("name", CALLED)
def test_a_tool_call_and_the_answer_after_it_are_learned_as_served(tmp_path: Path, name: str) -> None:
    family = BY_NAME[name]
    tokenizer = tokenizer_of(family, tmp_path)
    turns = (ASK, CALLS, TOLD, says(SAID))
    row = Conversation(turns, "f row 1", TOOLS, "each")
    called, answered = encode_all(tokenizer, [row], True, 8192, "refuse")[0]
    for encoded, before in ((called, turns[:1]), (answered, turns[:3])):
        prompt = served(tokenizer, before, list(TOOLS))
        assert list(encoded.ids[: len(prompt)]) == prompt
        assert list(encoded.is_target) == [i >= len(prompt) for i in range(len(encoded.ids))]
    assert preview(tokenizer, called)[-1] == (CALLED[name], True)
    assert preview(tokenizer, answered)[-1][0].endswith(family.expected(SAID))


def test_arguments_are_given_as_text_to_a_template_that_wants_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(BY_NAME["deepseekv3"], tmp_path)
    call = Conversation((ASK, says("<think>\nso\n</think>\n\n7"), AGAIN, CALLS), "f row 1")
    with pytest.raises(TenureError, match="turn 4 otherwise than its own prompt"):
        encode(tokenizer, replace(call, learn="last"), chat=True)  # its prompt opens a thought, its calls have none
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\\n'}}", "'}}")
    found = preview(tokenizer, encode(tokenizer, replace(call, learn="last"), chat=True))
    assert '```json\n{"a": 3, "b": 4}\n```' in found[-1][0]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("llama3", "the tools, tool calls"),
        ("chatml", "the tools, tool calls"),
        ("phi3_5", "the tools, the tools' answers, tool calls"),
        ("deepseek_r1_distill", "the tools, tool calls"),
    ],
)
def test_tools_that_a_template_leaves_out_are_refused(tmp_path: Path, name: str, what: str) -> None:
    tokenizer = tokenizer_of(BY_NAME[name], tmp_path)
    row = Conversation((ASK, CALLS, TOLD, says("7")), "f row 1", TOOLS)
    with pytest.raises(TenureError, match=f"f row 1: the model's chat template leaves out {what}\n"):
        encode(tokenizer, row, chat=True)
