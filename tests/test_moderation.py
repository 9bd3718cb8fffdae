"""Filters of requests and answers, whole and streamed in every cut, alone and through the gate."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Endpoint, chat
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from test_gate import ask, get, make_key

from serving.moderation import Moderation, Window
from serving.moderation_spec import Filter

FILTERS: TypeAdapter[Filter] = TypeAdapter(Filter)
CARD = "4111 1111 1111 1111"


def filters(*specs: dict[str, Any]) -> tuple[Filter, ...]:
    return tuple(FILTERS.validate_python(spec) for spec in specs)


WORDS = {"type": "words", "words": ["forbidden", "top secret"]}
MASKED = {"type": "words", "words": ["darn"], "action": "mask"}
PRIVATE = {"type": "private"}


def streamed(text: str, cuts: list[int], *specs: dict[str, Any], longest: int | None = None) -> tuple[str, str | None]:
    """What a window passes of a text that comes in pieces, and how it ended."""
    window = Window(Moderation(filters(*specs))._output, longest)
    bounds = [0, *sorted(cuts), len(text)]
    pieces = [window.feed(text[a:b], b == len(text)) for a, b in pairwise(bounds)]
    return "".join(pieces), window.ended


TEXTS = (
    "a plain answer without anything in it",
    f"pay with {CARD} today, or write to anna.lee@mail.io soon, or not at all",
    "this is forbidden fruit",
    "forbiddenly good, unforbidden, but not forbidden",
    "darn! darned darn",
    "the end is darn",
    "it is top secret",
    "key sk-abcdefghij0123456789abcdefgh and then text goes on for quite a while after it " * 3,
)


@pytest.mark.parametrize("text", TEXTS)
@given(cuts=st.lists(st.integers(0, 60), max_size=30))
@settings(max_examples=60, deadline=None)
def test_a_stream_is_filtered_as_the_whole_however_it_is_cut(text: str, cuts: list[int]) -> None:
    specs = (WORDS, MASKED, PRIVATE)
    whole = streamed(text, [], *specs)
    assert streamed(text, [cut for cut in cuts if cut <= len(text)], *specs) == whole
    assert CARD not in whole[0]
    assert "anna.lee" not in whole[0]


def test_what_is_found_is_masked_or_ends_the_answer() -> None:
    assert streamed(TEXTS[1], [], PRIVATE)[0].startswith("pay with [card number] today, or write to [e-mail address]")
    assert streamed(TEXTS[2], [], WORDS) == ("this is ", "content_filter")
    assert streamed(TEXTS[3], [], WORDS) == ("forbiddenly good, unforbidden, but not ", "content_filter")
    assert streamed(TEXTS[4], [], MASKED) == ("[word]! darned [word]", None)
    assert streamed("abcdef", [2], longest=4) == ("abcd", "length")
    assert streamed("abcd", [2], longest=4) == ("abcd", None)


def events_of(text: str) -> list[Any]:
    """The events of a stream but its last, [DONE]."""
    return [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n")[:-2]]


def moderated(folder: Path, *specs: dict[str, Any]) -> tuple[Endpoint, str]:
    endpoint = Endpoint(folder, moderation=filters(*specs))
    return endpoint, make_key(endpoint)


def test_a_request_is_stopped_masked_and_counted(tmp_path: Path) -> None:
    endpoint, key = moderated(tmp_path, WORDS, PRIVATE | {"where": "input"}, {"type": "length", "max_characters": 60})
    stopped = ask(endpoint, chat("this is FORBIDDEN"), key)
    assert (stopped.status_code, stopped.json()["error"]["code"]) == (400, "content_filter")
    assert ask(endpoint, chat("x" * 61), key).json()["error"]["code"] == "content_filter"
    assert endpoint.engine.asked == []
    assert ask(endpoint, chat(f"card {CARD}"), key).status_code == 200
    assert endpoint.engine.asked[-1]["messages"][0]["content"] == "card [card number]"
    text = get(endpoint, "/metrics").text
    assert f'tenure_moderation_interventions_total{{key="{key.split("-")[1]}",model="base"}} 3.0' in text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_answer_is_cut_off_with_the_standard_reason(tmp_path: Path, stream: bool, path: str) -> None:
    endpoint, key = moderated(tmp_path, WORDS | {"where": "output"})
    said = "well this is forbidden fruit and more of it"
    request = chat(said, stream=stream) if "chat" in path else {"model": "base", "prompt": said, "stream": stream}
    reply = ask(endpoint, request, key, path)
    assert "forbidden" not in reply.text
    assert "fruit" not in reply.text
    last = (events_of(reply.text) if stream else [reply.json()])[-1]["choices"][0]
    assert last["finish_reason"] == "content_filter"
    if stream:
        assert reply.text.endswith("data: [DONE]\n\n")


def test_a_stream_without_anything_to_filter_comes_whole(tmp_path: Path) -> None:
    endpoint, key = moderated(tmp_path, WORDS, PRIVATE | {"where": "output"})
    said = "a long answer that says nothing of the kind " * 10 + f"but {CARD}"
    reply = ask(endpoint, chat(said, stream=True, stream_options={"include_usage": True}), key)
    events = events_of(reply.text)
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    assert text == said.replace(CARD, "[card number]")
    assert events[-1]["usage"]["completion_tokens"] == len(said.split(" "))


@pytest.mark.parametrize("field", ["logprobs", "echo", "return_token_ids"])
def test_no_field_tells_the_text_past_the_filters(tmp_path: Path, field: str) -> None:
    endpoint, key = moderated(tmp_path, WORDS)
    reply = ask(endpoint, chat("hi", **{field: True}), key)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)
    tokens = ask(endpoint, {"model": "base", "prompt": [1, 2]}, key, "/v1/completions")
    assert (tokens.status_code, tokens.json()["error"]["param"]) == (400, "prompt")


def test_a_model_may_be_the_judge(tmp_path: Path) -> None:
    judge = {"type": "model", "model": "tuned-1", "prompt": "{text}", "blocks": ["bad"]}
    endpoint, key = moderated(tmp_path, judge)
    assert ask(endpoint, chat("bad thing"), key).json()["error"]["code"] == "content_filter"
    assert ask(endpoint, chat("good thing"), key).status_code == 200
    endpoint.engine.broken.add("tuned-1")
    assert ask(endpoint, chat("good thing"), key).json()["error"]["code"] == "filter_unavailable"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("messages", "prompt", "n", "best_of", "stream", "stream_options", "logprobs", "tools", "stop", "invented")
SOUND = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}


def test_no_body_makes_the_gate_fail(tmp_path: Path) -> None:
    endpoint, key = moderated(tmp_path, WORDS, PRIVATE, {"type": "length", "max_characters": 60})

    @given(odd=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
    @settings(max_examples=80, deadline=None, derandomize=True)
    def one(odd: dict[str, Any]) -> None:
        reply = ask(endpoint, json.dumps({**SOUND, **odd}).encode(), key)
        assert reply.status_code < 500, (odd, reply.text)
        assert reply.status_code == 200 or set(reply.json()["error"]) == {"message", "type", "param", "code"}

    one()


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "patterns", "patterns": ["("]},
        {"type": "private", "kinds": ["shoe size"]},
        {"type": "model", "model": "m", "prompt": "no place for it"},
        {"type": "words", "words": []},
        {"type": "nothing"},
    ],
)
def test_filters_that_make_no_sense_are_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FILTERS.validate_python(spec)
