"""Has the base model write the rows that a run replays: once, in a process of its own, as JSONL that people can read.

A chat model without prompts writes its own from its template's open user turn (Magpie, arXiv 2406.08464) and then
answers them; any other model writes plain text after its start token. Tokens are sampled from the whole distribution
at a temperature, without top-k, top-p or penalties, so that the rows are what the base itself would say.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.encoding import Encoded, encode, load_tokenizer, spaced, wants_chat
from training.data.locations import hash_data
from training.data.readers import read_rows
from training.data.rendering import render_prompt
from training.data.rows import Conversation, read_prompts
from training.data.tokens import continued_ids, prompt_ids, text_ids
from training.data.turns import Messages
from training.errors import fail
from training.models import hash_folder
from training.spec import RunSpec
from training.strategy import Generate, Replay
from training.workspace import Workspace, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 32
# Empty answers are asked for again, but a model that says nothing must not be asked for ever.
MAX_ROUNDS = 4
_LEAST_KEPT = 0.5
# Raised when the same settings come to give other rows.
_GENERATE_VERSION = 1
_MARK = "THE-PROMPT-STANDS-HERE"


@dataclass(frozen=True)
class GenerateJob:
    """What a generating process is sent: plain values. `max_length` bounds prompt and answer together, in tokens."""

    model: str
    generate: dict[str, Any]
    max_length: int
    overlong: str
    seed: int
    precision: str
    target: str
    log: str


@dataclass(frozen=True)
class Prompt:
    """What the base is to continue: the turns so far (none: it writes plain text), and their token ids."""

    messages: Messages
    chat: bool
    ids: tuple[int, ...]


@dataclass
class Counts:
    """What came of the rows asked for: `dropped` were empty, and `cut` answers, which are kept, have no end token."""

    asked: int
    kept: int = 0
    dropped: int = 0
    cut: int = 0


@dataclass
class Writer:
    """The loaded base with its tokenizer; every batch is sampled under a seed of its own."""

    job: GenerateJob
    settings: Generate
    model: Any
    tokenizer: PreTrainedTokenizerBase
    num_batches: int = 0
    counts: Counts = field(init=False)

    def __post_init__(self) -> None:
        self.counts = Counts(asked=self.settings.examples)

    def rows(self) -> list[dict[str, Any]]:
        """The rows asked for, as far as they are not empty.

        Raises:
            TenureError: fewer than half of them hold text after four rounds.
        """
        rows: list[dict[str, Any]] = []
        tried = 0
        for _ in range(MAX_ROUNDS):
            wanted = self.settings.examples - len(rows)
            if not wanted:
                break
            for start in range(0, wanted, BATCH_ROWS):
                rows += self._batch(tried + start, min(BATCH_ROWS, wanted - start))
            tried += wanted
        self.counts.kept = len(rows)
        if len(rows) < _LEAST_KEPT * self.settings.examples:
            what = f"only {len(rows)} of {self.settings.examples} rows that the base wrote hold text"
            raise fail(what, "protections", "give replay.generate.prompts, or replay.data instead")
        return rows

    def _batch(self, first: int, count: int) -> Iterator[dict[str, Any]]:
        prompts = self._prompts(first, count)
        limits = [min(self.settings.max_new_tokens, self.job.max_length - len(prompt.ids)) for prompt in prompts]
        answers = self._sample([prompt.ids for prompt in prompts], limits, self._stops())
        for prompt, (text, finished) in zip(prompts, answers, strict=True):
            if text.strip():
                self.counts.cut += not finished
                yield _row(prompt, text, finished)
            else:
                self.counts.dropped += 1

    def _prompts(self, first: int, count: int) -> list[Prompt]:
        """The prompts for rows `first` and on: the file's, over and over, or the base's own."""
        if self.settings.prompts:
            given = self._given
            return [given[index % len(given)] for index in range(first, first + count)]
        if not self.tokenizer.chat_template:
            return [Prompt((), False, tuple(start_ids(self.tokenizer)))] * count
        head, closing = open_turn(self.tokenizer)
        limit = min(self.settings.max_new_tokens, self.job.max_length - own_prompt_frame(self.tokenizer) - 1)
        stops = self._stops() | {*text_ids(self.tokenizer, closing)[:1]}
        texts = self._sample([tuple(text_ids(self.tokenizer, head))] * count, [limit] * count, stops)
        turns = [{"role": "user", "content": text.strip()} for text, _ in texts if text.strip()]
        prompts = [_chat_prompt(self.tokenizer, (turn,)) for turn in turns]
        longest = own_prompt_frame(self.tokenizer) + limit
        prompts = [prompt for prompt in prompts if len(prompt.ids) <= longest]
        self.counts.dropped += count - len(prompts)
        return prompts

    @property
    def _given(self) -> list[Prompt]:
        return given_prompts(self.settings, self.tokenizer, self.job.max_length, self.job.overlong)

    def _stops(self) -> set[int]:
        """The tokens that end a turn: the model's own end tokens and the tokenizer's."""
        own = self.model.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own]
        return {int(token) for token in (*own, self.tokenizer.eos_token_id) if token is not None}

    def _sample(self, rows: list[tuple[int, ...]], limits: list[int], stops: set[int]) -> list[tuple[str, bool]]:
        """Every row's continuation of at most its limit of tokens, and whether the base ended it by itself."""
        import torch

        if not rows:
            return []
        torch.manual_seed(self.job.seed + self.num_batches)
        self.num_batches += 1
        continued = _continue(self.model, rows, max(limits), self.settings.temperature, sorted(stops), self.tokenizer)
        pieces = [_until_stop(ids[:limit], stops) for ids, limit in zip(continued, limits, strict=True)]
        return [(_text(self.tokenizer, ids), finished) for ids, finished in pieces]


def replay_job(spec: RunSpec, workspace: Workspace) -> GenerateJob:
    """What is to be written for a run whose replay is generated, and the file it will lie in: the same for the same
    model, settings, prompts and seed."""
    replay = spec.protection(Replay)
    assert replay is not None
    assert replay.generate is not None
    precision = "bfloat16" if spec.scaling.gpus_per_worker else "float32"
    settings = replay.generate.model_dump(mode="json")
    parts = {
        "version": _GENERATE_VERSION,
        "model": hash_folder(Path(spec.model)),
        "generate": settings,
        "prompts": hash_data(replay.generate.prompts.path) if replay.generate.prompts else None,
        "max_length": spec.training.max_length,
        "overlong": spec.data.overlong,
        "seed": spec.training.seed,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    folder = workspace.cache / "replay"
    return GenerateJob(
        model=spec.model,
        generate=settings,
        max_length=spec.training.max_length,
        overlong=spec.data.overlong,
        seed=spec.training.seed,
        precision=precision,
        target=str(folder / f"{key}.jsonl"),
        log=str(folder / f"{key}.log"),
    )


def write_replay(job: GenerateJob) -> float:
    """Load the base, write its rows and, beside them, what came of it (.json). The seconds it took.

    Raises:
        TenureError: too few rows hold text.
    """
    from training.faults import explained_at, output_to

    with output_to(Path(job.log)), explained_at(Path(job.log)):
        started = time.monotonic()
        writer = Writer(job, Generate.model_validate(job.generate), *_load(job))
        rows = writer.rows()
        seconds = time.monotonic() - started
        target = Path(job.target)
        about = {"counts": asdict(writer.counts), "seconds": seconds, "base_hash": hash_folder(Path(job.model))}
        write_json(target.with_suffix(".json"), {**about, **asdict(job)})
        _write_rows(target, rows)
    return seconds


def read_written(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """The rows that the base wrote, encoded: loss on its answers, or on its whole text but the first token.

    Text need not come back as the tokens it was sampled as; rows are cut to max_length.
    """
    encoded = [_encode_written(row, where, tokenizer) for where, row in read_rows(path)]
    cut = [Encoded(example.ids[:max_length], example.is_target[:max_length]) for example in encoded]
    return [example for example in cut if example.num_targets]


def longest_row(generate: Generate, tokenizer: PreTrainedTokenizerBase, max_length: int, overlong: str) -> int:
    """A bound on the tokens of a row that the base will write.

    Raises:
        TenureError: max_length leaves no room for an answer, or the prompts are faulty.
    """
    if generate.prompts:
        prompts = given_prompts(generate, tokenizer, max_length, overlong)
        longest = max(len(prompt.ids) for prompt in prompts)
        return min(max_length, longest + generate.max_new_tokens)
    if not tokenizer.chat_template:
        return min(max_length, 1 + generate.max_new_tokens)
    frame = own_prompt_frame(tokenizer)
    if frame + 2 > max_length:
        what = f"the chat template's own {frame} tokens leave no room for a generated row of {max_length}"
        raise fail(what, "protections", f"set training.max_length: {frame + 2} or more")
    return min(max_length, frame + 2 * generate.max_new_tokens)


def given_prompts(
    generate: Generate, tokenizer: PreTrainedTokenizerBase, max_length: int, overlong: str
) -> list[Prompt]:
    """The file's prompts that leave room for an answer.

    Raises:
        TenureError: a row is faulty; or one leaves no room, and overlong is "refuse"; or none is left.
    """
    assert generate.prompts is not None
    path = str(generate.prompts.path)
    chat = wants_chat(generate.prompts.chat, tokenizer, path)
    read = read_prompts(generate.prompts)
    prompts = [_chat_prompt(tokenizer, p.messages, p.where) if chat else _plain(tokenizer, p) for p in read]
    kept = [prompt for prompt in prompts if len(prompt.ids) < max_length]
    if not kept or (len(kept) < len(prompts) and overlong == "refuse"):
        longest = max(len(prompt.ids) for prompt in prompts)
        what = f"{len(prompts) - len(kept)} prompts leave no room for an answer within max_length {max_length}"
        raise fail(what, path, f"set training.max_length above {longest}, or data.overlong: drop")
    return kept


def open_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before a first user turn's text, and after it up to the answer."""
    head, _, closing = render_prompt(tokenizer, [{"role": "user", "content": _MARK}], "replay").partition(_MARK)
    return head, closing


def own_prompt_frame(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the chat template puts around a user turn's text."""
    return sum(len(text_ids(tokenizer, text)) for text in open_turn(tokenizer))


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What text starts after: the tokenizer's own start tokens, or its start or end token."""
    own = prompt_ids(tokenizer, "")
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return own or [int(first)]


def _chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str = "replay") -> Prompt:
    return Prompt(messages, True, tuple(text_ids(tokenizer, render_prompt(tokenizer, messages, where))))


def _plain(tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> Prompt:
    text = "\n".join(turn["content"] for turn in prompt.messages)
    return Prompt(({"role": "user", "content": text},), False, tuple(prompt_ids(tokenizer, text)))


def _row(prompt: Prompt, text: str, finished: bool) -> dict[str, Any]:
    """A row as it is written: chat turns, prompt and completion, or text."""
    if prompt.chat:
        return {"messages": [*prompt.messages, {"role": "assistant", "content": text}], "finished": finished}
    if prompt.messages:
        return {"prompt": prompt.messages[0]["content"], "completion": text, "finished": finished}
    return {"text": text, "finished": finished}


def _encode_written(row: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """A written row's ids and targets. An answer that was cut has no end token: the base did not end there."""
    if "text" in row:
        head, answer = start_ids(tokenizer), text_ids(tokenizer, row["text"])
        answer += [tokenizer.eos_token_id] if row["finished"] else []
        return Encoded((*head, *answer), (False,) * len(head) + (True,) * len(answer))
    chat = "messages" in row
    messages = tuple(row["messages"]) if chat else _turns(row)
    if row["finished"]:
        return encode(tokenizer, Conversation(messages, where), chat)
    prompt = _chat_prompt(tokenizer, messages[:-1]) if chat else _plain(tokenizer, Conversation(messages[:-1], where))
    text = messages[-1]["content"]
    answer = continued_ids(tokenizer, text if chat else spaced(messages[0]["content"], text))
    return Encoded((*prompt.ids, *answer), (False,) * len(prompt.ids) + (True,) * len(answer))


def _turns(row: dict[str, Any]) -> Messages:
    return ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]})


def _load(job: GenerateJob) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base in the job's precision, on a GPU where that is bfloat16, and its tokenizer."""
    import torch

    from training.tuning import load_base

    gpu = job.precision == "bfloat16"
    model = load_base(Path(job.model), torch.bfloat16 if gpu else torch.float32)
    return model.to("cuda" if gpu else "cpu").eval(), load_tokenizer(Path(job.model))


def _continue(
    model: Any,
    rows: Sequence[tuple[int, ...]],
    most: int,
    temperature: float,
    stops: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    """At most `most` sampled tokens after every row; what follows a stop is padding."""
    import torch
    from transformers import GenerationConfig

    padded = tokenizer.pad({"input_ids": [list(row) for row in rows]}, padding_side="left", return_tensors="pt")
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=most,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    # What generate() is not told it takes from the model's own settings: penalties and cuts among them.
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.inference_mode():
            whole = model.generate(**padded.to(model.device), generation_config=config)
    finally:
        model.generation_config = kept
    continued: list[list[int]] = whole[:, padded["input_ids"].shape[1] :].tolist()
    return continued


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """What tokens say, without what is no character: bytes that a cut, or the sampling itself, left incomplete."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).replace("\N{REPLACEMENT CHARACTER}", "")


def _until_stop(ids: list[int], stops: set[int]) -> tuple[list[int], bool]:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return (ids, False) if end is None else (ids[:end], True)


def _write_rows(target: Path, rows: list[dict[str, Any]]) -> None:
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(target)
