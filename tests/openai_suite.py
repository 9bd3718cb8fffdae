"""What any client of OpenAI's API expects, as cases over the official client.

    python tests/openai_suite.py http://127.0.0.1:8000/v1 MODEL

asks another server the same, such as vLLM's own, and tells what it does otherwise.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

Case = Callable[[openai.OpenAI, str], None]
UNICODE = "naïve café, 日本語, العربية, 👩‍👩‍👧 and \u200b nothing"
LENGTH = 8


def _chat(client: openai.OpenAI, model: str, text: str = "Hi there", **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    more = {"max_tokens": LENGTH, "temperature": 0, **more}
    return client.chat.completions.create(model=model, messages=messages, **more)


def _complete(client: openai.OpenAI, model: str, prompt: Any = "Once upon", **more: Any) -> Any:
    more = {"max_tokens": LENGTH, "temperature": 0, **more}
    return client.completions.create(model=model, prompt=prompt, **more)


def _streamed(pieces: Iterator[Any]) -> tuple[str, list[Any]]:
    found = list(pieces)
    return "".join(piece.choices[0].delta.content or "" for piece in found if piece.choices), found


def chat_answers(client: openai.OpenAI, model: str) -> None:
    reply = _chat(client, model)
    assert reply.object == "chat.completion"
    assert reply.model == model
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason in ("stop", "length")


def chat_counts_tokens(client: openai.OpenAI, model: str) -> None:
    usage = _chat(client, model).usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= LENGTH


def chat_stops_at_max_tokens(client: openai.OpenAI, model: str) -> None:
    reply = _chat(client, model, max_tokens=2)
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (2, "length")


def chat_takes_max_completion_tokens(client: openai.OpenAI, model: str) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    reply = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=3, temperature=0)
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 3


def chat_is_greedy_at_zero(client: openai.OpenAI, model: str) -> None:
    assert len({_chat(client, model).choices[0].message.content for _ in range(3)}) == 1


def chat_streams_the_same(client: openai.OpenAI, model: str) -> None:
    text, pieces = _streamed(_chat(client, model, stream=True))
    assert text == _chat(client, model).choices[0].message.content
    assert len({piece.id for piece in pieces}) == 1
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")


def chat_streams_usage_when_asked(client: openai.OpenAI, model: str) -> None:
    _, pieces = _streamed(_chat(client, model, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].choices == []
    assert pieces[-1].usage.completion_tokens == _chat(client, model).usage.completion_tokens


def chat_streams_no_usage_unasked(client: openai.OpenAI, model: str) -> None:
    _, pieces = _streamed(_chat(client, model, stream=True))
    assert all(piece.usage is None for piece in pieces)


def chat_gives_log_probabilities(client: openai.OpenAI, model: str) -> None:
    content = _chat(client, model, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in content)


def chat_streams_log_probabilities(client: openai.OpenAI, model: str) -> None:
    _, pieces = _streamed(_chat(client, model, stream=True, logprobs=True))
    assert any(piece.choices and piece.choices[0].logprobs for piece in pieces)


def chat_gives_n_answers(client: openai.OpenAI, model: str) -> None:
    reply = _chat(client, model, n=3, temperature=1.0)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]


def chat_streams_n_answers(client: openai.OpenAI, model: str) -> None:
    pieces = list(_chat(client, model, n=2, temperature=1.0, stream=True))
    assert {choice.index for piece in pieces for choice in piece.choices} == {0, 1}


def chat_repeats_with_a_seed(client: openai.OpenAI, model: str) -> None:
    assert len({_chat(client, model, seed=7, temperature=1.0).choices[0].message.content for _ in range(2)}) == 1


def chat_takes_a_system_turn(client: openai.OpenAI, model: str) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert client.chat.completions.create(model=model, messages=messages, max_tokens=2).choices


def chat_takes_many_turns(client: openai.OpenAI, model: str) -> None:
    turns: Any = [{"role": ("user", "assistant")[place % 2], "content": str(place)} for place in range(9)]
    assert client.chat.completions.create(model=model, messages=turns, max_tokens=2).choices


def chat_takes_parts_of_text(client: openai.OpenAI, model: str) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert client.chat.completions.create(model=model, messages=messages, max_tokens=2).choices


def chat_takes_unicode(client: openai.OpenAI, model: str) -> None:
    assert _chat(client, model, UNICODE).choices


def chat_keeps_to_a_schema(client: openai.OpenAI, model: str) -> None:
    schema = {"type": "string", "enum": ["yes", "no"]}  # in an object a random model may write spaces without end
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    text = _chat(client, model, response_format=wanted, max_tokens=20).choices[0].message.content
    assert json.loads(text) in ("yes", "no")


def chat_ends_at_stop_words(client: openai.OpenAI, model: str) -> None:
    whole = _chat(client, model).choices[0].message.content
    stop = whole[len(whole) // 2 :][:1]
    assert stop not in (_chat(client, model, stop=[stop]).choices[0].message.content or "")


def chat_takes_sampling_options(client: openai.OpenAI, model: str) -> None:
    assert _chat(client, model, temperature=0.7, top_p=0.9, frequency_penalty=0.5, presence_penalty=0.5).choices


def chat_takes_logit_bias(client: openai.OpenAI, model: str) -> None:
    assert _chat(client, model, logit_bias={"10": 5}).choices


def chat_takes_a_user(client: openai.OpenAI, model: str) -> None:
    assert _chat(client, model, user="somebody").choices


def chat_has_raw_headers(client: openai.OpenAI, model: str) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    raw = client.chat.completions.with_raw_response.create(model=model, messages=messages, max_tokens=1)
    assert raw.status_code == 200
    assert raw.headers["content-type"].startswith("application/json")


def chat_can_be_left_midway(client: openai.OpenAI, model: str) -> None:
    stream = _chat(client, model, stream=True, max_tokens=200)
    next(iter(stream))
    stream.close()
    assert _chat(client, model).choices


def chat_in_parallel_is_chat_alone(client: openai.OpenAI, model: str) -> None:
    texts = [f"Question {number}" for number in range(6)]
    alone = [_chat(client, model, text).choices[0].message.content for text in texts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda text: _chat(client, model, text).choices[0].message.content, texts))
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= 5  # sums in batches round differently


def completion_answers(client: openai.OpenAI, model: str) -> None:
    reply = _complete(client, model)
    assert (reply.object, reply.model) == ("text_completion", model)
    assert reply.choices[0].text


def completion_streams_the_same(client: openai.OpenAI, model: str) -> None:
    pieces = list(_complete(client, model, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == _complete(client, model).choices[0].text


def completion_streams_usage_when_asked(client: openai.OpenAI, model: str) -> None:
    pieces = list(_complete(client, model, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].usage.completion_tokens > 0


def completion_echoes(client: openai.OpenAI, model: str) -> None:
    assert _complete(client, model, "Once upon", echo=True).choices[0].text.startswith("Once upon")


def completion_scores_a_prompt(client: openai.OpenAI, model: str) -> None:
    found = _complete(client, model, [5, 6, 7, 8], echo=True, logprobs=1, max_tokens=0).choices[0].logprobs
    assert len(found.token_logprobs) == 4
    assert found.token_logprobs[0] is None


def completion_takes_token_ids(client: openai.OpenAI, model: str) -> None:
    assert _complete(client, model, [5, 6, 7]).usage.prompt_tokens == 3


def completion_takes_several_prompts(client: openai.OpenAI, model: str) -> None:
    reply = _complete(client, model, ["one", "two", "three"])
    assert [choice.index for choice in reply.choices] == [0, 1, 2]


def completion_gives_log_probabilities(client: openai.OpenAI, model: str) -> None:
    found = _complete(client, model, logprobs=2).choices[0].logprobs
    assert all(value <= 0 for value in found.token_logprobs)


def completion_takes_a_long_prompt(client: openai.OpenAI, model: str) -> None:
    assert _complete(client, model, [5] * 900).usage.prompt_tokens == 900


def too_long_is_a_400(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="context length"):
        _complete(client, model, [5] * 5000)


def an_unknown_model_is_a_404(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError):
        _chat(client, f"{model}-nobody")


def no_messages_are_a_400(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        client.post("/chat/completions", body={"model": model}, cast_to=object)


def a_wrong_type_is_a_400(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        _chat(client, model, temperature="warm")


def a_negative_length_is_a_400(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        _chat(client, model, max_tokens=-1)


def a_temperature_below_zero_is_a_400(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        _chat(client, model, temperature=-1)


def no_answers_are_a_400(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        _chat(client, model, n=0)


def errors_of_a_stream_come_before_it(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        _complete(client, model, [5] * 5000, stream=True)


def models_are_listed(client: openai.OpenAI, model: str) -> None:
    assert model in {found.id for found in client.models.list()}


def chat_takes_tools_without_calling_one(client: openai.OpenAI, model: str) -> None:
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}
    message = _chat(client, model, tools=[{"type": "function", "function": function}], tool_choice="none")
    assert not message.choices[0].message.tool_calls


def chat_takes_an_empty_text(client: openai.OpenAI, model: str) -> None:
    assert _chat(client, model, "").choices


def chat_takes_a_speakers_name(client: openai.OpenAI, model: str) -> None:
    messages: Any = [{"role": "user", "name": "Ada", "content": "Hi"}]
    assert client.chat.completions.create(model=model, messages=messages, max_tokens=2).choices


def chat_takes_several_stop_words(client: openai.OpenAI, model: str) -> None:
    assert _chat(client, model, stop=["never said", "nor this"]).choices


def chat_streams_to_a_schema(client: openai.OpenAI, model: str) -> None:
    schema = {"type": "string", "enum": ["yes", "no"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    text, _ = _streamed(_chat(client, model, response_format=wanted, max_tokens=20, stream=True))
    assert json.loads(text) in ("yes", "no")


def chat_streams_unicode_whole(client: openai.OpenAI, model: str) -> None:
    text, _ = _streamed(_chat(client, model, UNICODE, stream=True, max_tokens=60))
    assert text == _chat(client, model, UNICODE, max_tokens=60).choices[0].message.content


def chat_streams_one_end(client: openai.OpenAI, model: str) -> None:
    _, pieces = _streamed(_chat(client, model, stream=True))
    assert sum(bool(piece.choices and piece.choices[0].finish_reason) for piece in pieces) == 1


def chat_streams_events_that_end_in_done(client: openai.OpenAI, model: str) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    create = client.chat.completions.with_streaming_response.create
    with create(model=model, messages=messages, max_tokens=3, stream=True) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        events = [line for line in raw.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events)


def chat_names_every_answer_anew(client: openai.OpenAI, model: str) -> None:
    assert len({_chat(client, model).id for _ in range(3)}) == 3


def chat_tells_when(client: openai.OpenAI, model: str) -> None:
    assert abs(_chat(client, model).created - time.time()) < 60


def chat_takes_the_engines_own_options(client: openai.OpenAI, model: str) -> None:
    reply = _chat(client, model, extra_body={"min_tokens": LENGTH, "ignore_eos": True})
    assert reply.usage.completion_tokens == LENGTH


def chat_in_parallel_streams(client: openai.OpenAI, model: str) -> None:
    def one(number: int) -> bool:
        _, pieces = _streamed(_chat(client, model, f"Question {number}", stream=True))
        return pieces[-1].choices[0].finish_reason in ("stop", "length")

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(16)))


def chat_answers_an_asynchronous_client(client: openai.OpenAI, model: str) -> None:
    async def ask() -> list[Any]:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        messages: Any = [{"role": "user", "content": "Hi"}]
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key, http_client=http) as other:
            stream = await other.chat.completions.create(model=model, messages=messages, max_tokens=3, stream=True)
            return [piece async for piece in stream]

    assert asyncio.run(ask())[-1].choices[0].finish_reason in ("stop", "length")


def completion_ends_at_stop_words(client: openai.OpenAI, model: str) -> None:
    whole = _complete(client, model).choices[0].text
    stop = whole[len(whole) // 2 :][:1]
    assert stop not in _complete(client, model, stop=stop).choices[0].text


def completion_gives_n_answers(client: openai.OpenAI, model: str) -> None:
    assert [choice.index for choice in _complete(client, model, n=2, temperature=1.0).choices] == [0, 1]


def completion_streams_n_answers(client: openai.OpenAI, model: str) -> None:
    pieces = list(_complete(client, model, n=2, temperature=1.0, stream=True))
    assert {choice.index for piece in pieces for choice in piece.choices} == {0, 1}


def completion_repeats_with_a_seed(client: openai.OpenAI, model: str) -> None:
    assert len({_complete(client, model, seed=7, temperature=1.0).choices[0].text for _ in range(2)}) == 1


def completion_streams_log_probabilities(client: openai.OpenAI, model: str) -> None:
    pieces = list(_complete(client, model, logprobs=1, stream=True))
    assert any(piece.choices and piece.choices[0].logprobs for piece in pieces)


def completion_takes_unicode(client: openai.OpenAI, model: str) -> None:
    assert _complete(client, model, UNICODE).choices


def completion_takes_several_prompts_of_token_ids(client: openai.OpenAI, model: str) -> None:
    assert _complete(client, model, [[5, 6], [7, 8, 9]]).usage.prompt_tokens == 5


def a_top_p_above_one_is_a_400(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        _chat(client, model, top_p=2)


def no_list_of_messages_is_a_400(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        client.post("/chat/completions", body={"model": model, "messages": "Hi"}, cast_to=object)


def too_many_log_probabilities_are_a_400(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        _chat(client, model, logprobs=True, top_logprobs=1000)


def an_unknown_path_is_a_404(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.post("/nothing", body={"model": model}, cast_to=object)


def errors_tell_message_and_kind(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _complete(client, model, [5] * 5000)
    assert isinstance(caught.value.body, dict)
    assert {"message", "type", "param", "code"} <= set(caught.value.body)


def models_can_be_looked_up(client: openai.OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model


CASES: tuple[Case, ...] = tuple(
    case
    for name, case in sorted(globals().items())
    if name.startswith(("chat_", "completion_", "too_", "an_", "a_", "no_", "errors_", "models_"))
)


def main(url: str, model: str) -> None:
    """Every case against a server, and those that failed."""
    http = openai.DefaultHttpxClient(trust_env=False)
    otherwise = {}
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120, http_client=http) as client:
        for case in CASES:
            try:
                case(client, model)
            except (AssertionError, openai.OpenAIError, pytest.fail.Exception) as error:
                otherwise[case.__name__] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps({"cases": len(CASES), "otherwise": otherwise}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
