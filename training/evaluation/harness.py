"""The harness's transformers backend with the token ids of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from training.data.tokens import continued_ids, text_ids
from training.evaluation.likelihood import BatchSize, Likelihoods, Pair
from training.evaluation.suites import Question, ask, context_ids
from training.suite_spec import FileSuite

# Prompts that are answered together at first; on a GPU their number follows its memory.
CPU_ROWS, GPU_ROWS, MOST_ROWS = 16, 64, 512


class HarnessModel(HFLM):  # type: ignore[misc]
    """Encodes prompt and answer apart, as training does, for the suite that is being scored; batches by memory.

    Left alone, the harness encodes both as one text, moves the whitespace that ends a prompt into the answer, and
    lets the tokenizer put its start token before a chat prompt.

    Args:
        batch_size: rows of a batch; "auto" for as many as memory allows.
    """

    suite: FileSuite

    def __init__(self, *given: Any, batch_size: int | Literal["auto"] = "auto", **named: Any) -> None:
        super().__init__(*given, batch_size=1 if batch_size == "auto" else batch_size, **named)
        gpu = self.device.type == "cuda"
        first = (GPU_ROWS if gpu else CPU_ROWS) if batch_size == "auto" else batch_size
        self._rows = BatchSize(first, MOST_ROWS if batch_size == "auto" else first, self.device)
        self._likelihoods = Likelihoods(self.model, self.max_length, None if batch_size == "auto" else batch_size)
        self._answers: dict[Question, str] = {}
        self._knows_all = False
        self._context: tuple[FileSuite | None, str, list[int]] = (None, "", [])

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers in order; a prompt that two suites ask, such as a table's form and its sums, is answered once."""
        keys = [self._question(*request.args) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._answers}
        assert not (new and self._knows_all), "the engine that answers was not asked this"
        ordered = sorted(new, key=lambda key: -len(new[key].args[0]))
        while ordered:
            batch = ordered[: self._rows.value]
            found = self._generated([new[key] for key in batch])
            self._answers |= zip(batch, found, strict=False)
            ordered = ordered[len(found) :]
        return [self._answers[key] for key in keys]

    def know(self, answers: dict[Question, str]) -> None:
        """Take the answers to all questions from another engine."""
        self._answers, self._knows_all = dict(answers), True

    def _generated(self, requests: list[Instance]) -> list[str]:
        """Answers of one batch; none where memory ran out, and the batch size was halved."""
        self.batch_size_per_gpu = len(requests)
        try:
            found: list[str] = super().generate_until(requests, disable_tqdm=True)
        except torch.cuda.OutOfMemoryError:
            if len(requests) == 1:
                raise
            found = []
        if found:
            self._rows.grow()
        else:
            self._rows.halve()
        return found

    def likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """As Likelihoods.of(), in batches by memory."""
        return self._likelihoods.of(pairs)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        """Log-probabilities of continuations that are encoded already, and whether greedy decoding gives them."""
        return self._likelihoods.of([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows where one is longer than the model reads."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        found = iter(self._likelihoods.of([window for text in windows for window in text]))
        return [sum(next(found)[0] for _ in text) for text in windows]

    def _windows(self, text: str) -> Iterator[Pair]:
        ids = self.tok_encode(text)
        for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
            yield make_disjoint_window(window)

    def _question(self, prompt: str, settings: dict[str, Any]) -> Question:
        return ask(self.suite, prompt, self.tokenizer, settings["max_gen_toks"], self.max_length)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """The ids of text without a prompt, before which the harness puts one start token."""
        ids = text_ids(self.tokenizer, string)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        answer = continued_ids(self.tokenizer, continuation) if context else text_ids(self.tokenizer, continuation)
        if self._context[:2] != (self.suite, context):  # the choices of an item follow each other
            self._context = (self.suite, context, context_ids(self.suite, context, self.tokenizer))
        return self._context[2], answer

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and attention mask, each (prompts, longest), of prompts to be continued."""
        rows = [context_ids(self.suite, string, self.tokenizer)[-(left_truncate_len or 0) :] for string in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]
