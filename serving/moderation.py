"""Filters before and after generation; an answer is filtered as it streams, behind a window that is held back."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from serving.exchange import App, Exchange, Json
from serving.judging import blocks
from serving.moderation_spec import Action, Filter, Length, ModelJudge, Patterns, Private, Words
from serving.refusals import Refusal
from training.inspection.private import private_places

Place = tuple[int, int, str]
Find = Callable[[str], list[Place]]

# Fields of a request that hold text for the model.
TEXTS = ("messages", "prompt", "suffix", "tools", "functions", "documents", "chat_template_kwargs")
# Fields that would tell an answer's text past its filters.
BYPASSES = ("logprobs", "top_logprobs", "prompt_logprobs", "echo", "return_token_ids", "return_tokens_as_token_ids")
PRIVATE_WINDOW = 128
_NO_TEXT = ("role", "type", "name", "id", "tool_call_id")
_CONTEXT = 32
_LOOKAHEAD = 4  # a match this near the end of what has come may still grow or turn out none


@dataclass(frozen=True)
class Finder:
    """Where a filter finds something in a text, and what happens to it."""

    find: Find
    action: Action
    window: int


def _words(spec: Words) -> Finder:
    words = "|".join(re.escape(word) for word in sorted(spec.words, key=len, reverse=True))
    regex = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
    return Finder(partial(_matches, (regex,), "word"), spec.action, max(map(len, spec.words)) + _LOOKAHEAD)


def _patterns(spec: Patterns) -> Finder:
    regexes = tuple(re.compile(pattern) for pattern in spec.patterns)
    return Finder(partial(_matches, regexes, "pattern"), spec.action, spec.window)


def _private(spec: Private) -> Finder:
    def find(text: str) -> list[Place]:
        return [place for place in private_places(text) if spec.kinds is None or place[2] in spec.kinds]

    return Finder(find, spec.action, PRIVATE_WINDOW)


def _matches(regexes: Sequence[re.Pattern[str]], kind: str, text: str) -> list[Place]:
    found = ((*match.span(), kind) for regex in regexes for match in regex.finditer(text))
    return [place for place in found if place[1] > place[0]]


_FINDERS: dict[type[Any], Callable[[Any], Finder]] = {Words: _words, Patterns: _patterns, Private: _private}


class Moderation:
    """The filters of one endpoint. A key of administration passes: it compares the model with what was scored."""

    def __init__(self, filters: Sequence[Filter]) -> None:
        self._input = _finders(filters, "input")
        self._output = _finders(filters, "output")
        self._judges = [spec for spec in filters if isinstance(spec, ModelJudge)]
        self._longest_in = _longest(filters, "input")
        self._longest_out = _longest(filters, "output")

    async def check_input(self, exchange: Exchange, request: Json, app: App) -> Json:
        """The request with what is to be masked masked.

        Raises:
            Refusal: 400 with the code content_filter.
        """
        checks = self._input or self._judges or self._longest_in is not None
        if not checks or _is_admin(exchange):
            return request
        texts = {name: request[name] for name in TEXTS if request.get(name) is not None}
        if _has_token_ids(request.get("prompt")):
            raise Refusal(
                400, "prompts of token ids are not taken where prompts are filtered", "invalid_value", "prompt"
            )
        strings = list(_strings({name: texts[name] for name in texts if name in ("messages", "prompt", "suffix")}))
        self._check_length(exchange, strings)
        masked = _mapped(texts, partial(self._checked, exchange))
        for judge in self._judges:
            if await blocks(judge, "\n".join(strings), exchange, app):
                raise _blocked(exchange, "a model-based filter")
        return {**request, **masked}

    def of_answer(self, exchange: Exchange, request: Json, app: App) -> Answers | None:
        """What filters the request's answer; None where nothing does.

        Raises:
            Refusal: 400, the request asks for what would tell the text past the filters.
        """
        if (not self._output and self._longest_out is None) or _is_admin(exchange):
            return None
        for name in BYPASSES:
            if request.get(name):
                raise Refusal(400, f"{name} is not offered where answers are filtered", "invalid_value", name)
        prompts = request.get("prompt")
        count = int(request.get("n") or 1) * (len(prompts) if isinstance(prompts, list) else 1)
        return Answers(exchange, self._output, self._longest_out, count)

    def _checked(self, exchange: Exchange, text: str) -> str:
        for finder in self._input:
            places = finder.find(text)
            if places and finder.action == "block":
                raise _blocked(exchange, f"a filter ({places[0][2]})")
            if places:
                exchange.interventions += len(places)
                text = _masked(text, places)
        return text

    def _check_length(self, exchange: Exchange, strings: list[str]) -> None:
        count = sum(map(len, strings))
        if self._longest_in is not None and count > self._longest_in:
            exchange.interventions += 1
            message = f"the prompt has {count:,} characters, more than the {self._longest_in:,} that are let through"
            raise Refusal(400, message, "content_filter")


class Answers:
    """Filters the choices of one answer, whole or as it streams."""

    def __init__(self, exchange: Exchange, finders: Sequence[Finder], longest: int | None, count: int) -> None:
        self._exchange = exchange
        self._finders = finders
        self._longest = longest
        self._count = count
        self._windows: dict[tuple[Any, ...], Window] = {}
        self._blocked: set[int] = set()

    @property
    def ended(self) -> bool:
        """Whether every choice was cut off, so that nothing more is to come."""
        return len(self._blocked) >= self._count

    def whole(self, answer: Json) -> Json:
        """The answer filtered; a choice that was cut off ends with finish_reason content_filter (or length)."""
        for choice in answer.get("choices", []):
            self._choice(choice, choice.get("message"), final=True)
        return answer

    def event(self, event: Json) -> Json | None:
        """An event of the stream filtered; None when nothing of it is left to send."""
        choices = [choice for choice in event.get("choices", []) if choice.get("index", 0) not in self._blocked]
        if not choices and event.get("choices"):
            return None
        for choice in choices:
            self._choice(choice, choice.get("delta"), final=choice.get("finish_reason") is not None)
        return {**event, "choices": choices}

    def _choice(self, choice: Json, message: Any, final: bool) -> None:
        index = int(choice.get("index", 0))
        for holder, name, channel in _channels(choice, message):
            window = self._windows.setdefault((index, *channel), Window(self._finders, self._longest))
            holder[name] = window.feed(holder.get(name) or "", final)
        if final:
            self._flush(index, choice, message)
        windows = [window for key, window in self._windows.items() if key[0] == index]
        self._exchange.interventions += sum(window.take_count() for window in windows)
        ended = next((window.ended for window in windows if window.ended), None)
        if ended is not None:
            choice["finish_reason"] = ended
            self._blocked.add(index)

    def _flush(self, index: int, choice: Json, message: Any) -> None:
        """What windows still hold of this choice goes out with its last event."""
        rest = {key: window.feed("", True) for key, window in self._windows.items() if key[0] == index}
        for key, text in rest.items():
            if text:
                _put(choice, message, key[1:], text)


def _channels(choice: Json, message: Any) -> list[tuple[Json, str, tuple[Any, ...]]]:
    """(where, field, channel) of every text in a choice: its text, content, reasoning and calls of tools."""
    found: list[tuple[Json, str, tuple[Any, ...]]] = []
    if isinstance(choice.get("text"), str):
        found.append((choice, "text", ("text",)))
    if not isinstance(message, dict):
        return found
    for name in ("content", "reasoning", "reasoning_content", "refusal"):
        if isinstance(message.get(name), str):
            found.append((message, name, (name,)))
    for place, call in enumerate(message.get("tool_calls") or []):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            found.append((function, "arguments", ("tool", call.get("index", place))))
    return found


def _put(choice: Json, message: Any, channel: tuple[Any, ...], text: str) -> None:
    if channel == ("text",):
        choice["text"] = (choice.get("text") or "") + text
    elif isinstance(message, dict) and channel[0] == "tool":
        message.setdefault("tool_calls", []).append({"index": channel[1], "function": {"arguments": text}})
    elif isinstance(message, dict):
        message[channel[0]] = (message.get(channel[0]) or "") + text


@dataclass
class Window:
    """One text as it comes: the last characters are held back until it is clear that no match reaches into them."""

    finders: Sequence[Finder]
    longest: int | None
    ended: str | None = None
    _held: str = ""
    _before: str = ""
    _passed: int = 0
    _count: int = 0
    _done: bool = field(default=False)

    def take_count(self) -> int:
        """Interventions since this was last asked."""
        count, self._count = self._count, 0
        return count

    def feed(self, text: str, final: bool) -> str:
        """What may go out now, of this text and what was held before."""
        if self.ended or (self._done and not text):
            return ""
        self._held += text
        self._done = final
        passed = self._pass(final)
        if self.longest is not None and self._passed + len(passed) > self.longest:
            passed, self._held = passed[: self.longest - self._passed], ""
            self.ended, self._count = "length", self._count + 1
        self._passed += len(passed)
        return passed

    def _pass(self, final: bool) -> str:
        places = [(place, finder.action) for finder in self.finders for place in self._find(finder)]
        sure = len(self._held) if final else len(self._held) - _LOOKAHEAD
        # What reaches to the end of what has come may still grow, or turn out to be none.
        limit = min([len(self._held), *(place[0] for place, _ in places if place[1] > sure)])
        blocks = [place[0] for place, action in places if action == "block" and place[1] <= sure]
        masks = sorted(place for place, action in places if action == "mask" and place[1] <= sure)
        if blocks:
            return self._block(min(blocks), masks)
        window = 0 if final else max((finder.window for finder in self.finders), default=0)
        cut = max(0, min(len(self._held) - window, limit))
        for start, end, _ in masks:
            if start < cut < end:
                cut = end if end <= limit else start
        return self._release(cut, [place for place in masks if place[1] <= cut])

    def _find(self, finder: Finder) -> list[Place]:
        """Places in what is held, seen after what has gone out."""
        shift = len(self._before)
        places = [(start - shift, end - shift, kind) for start, end, kind in finder.find(self._before + self._held)]
        return [(max(0, start), end, kind) for start, end, kind in places if end > 0 and start >= 0]

    def _block(self, start: int, masks: list[Place]) -> str:
        passed = _masked(self._held[:start], [place for place in masks if place[1] <= start])
        self._held, self.ended, self._count = "", "content_filter", self._count + 1
        return passed

    def _release(self, cut: int, masks: list[Place]) -> str:
        gone, self._held = self._held[:cut], self._held[cut:]
        self._before = (self._before + gone)[-_CONTEXT:]
        self._count += len(masks)
        return _masked(gone, masks)


def _masked(text: str, places: Sequence[Place]) -> str:
    """The text with every place replaced by its kind; of two that overlap the first counts."""
    done, pieces = 0, []
    for start, end, kind in sorted(places):
        if start >= done:
            pieces += [text[done:start], f"[{kind}]"]
            done = end
    return "".join([*pieces, text[done:]])


def _finders(filters: Sequence[Filter], side: str) -> list[Finder]:
    return [_FINDERS[type(spec)](spec) for spec in filters if type(spec) in _FINDERS and _on(spec, side)]


def _longest(filters: Sequence[Filter], side: str) -> int | None:
    return min((spec.max_characters for spec in filters if isinstance(spec, Length) and _on(spec, side)), default=None)


def _on(spec: Any, side: str) -> bool:
    return spec.where in (side, "both")


def _is_admin(exchange: Exchange) -> bool:
    return exchange.key is not None and "admin" in exchange.key.scopes


def _has_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and any(not isinstance(part, str) for part in prompt)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [part for name, part in value.items() if name not in _NO_TEXT]
    parts = value if isinstance(value, list) else ()
    return [text for part in parts for text in _strings(part)]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(part, change) for name, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list) else value


def _blocked(exchange: Exchange, by: str) -> Refusal:
    exchange.interventions += 1
    return Refusal(400, f"the request was stopped by {by}", "content_filter")
