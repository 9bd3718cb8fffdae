"""What any client of OpenAI's API expects, as cases over the official client; also run against vLLM's own server."""

from __future__ import annotations

import json
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


CASES: tuple[Case, ...] = tuple(
    case
    for name, case in sorted(globals().items())
    if name.startswith(("chat_", "completion_", "too_", "an_", "a_", "no_", "errors_", "models_"))
)
