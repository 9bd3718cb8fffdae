"""The harness's transformers backend with the token ids of training."""

from __future__ import annotations

import json
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from training.data.tokens import continued_ids, text_ids
from training.evaluation.suites import context_ids
from training.suite_spec import FileSuite


class HarnessModel(HFLM):  # type: ignore[misc]
    """Encodes prompt and answer apart, as training does, for the suite that is being scored.

    Left alone, the harness encodes both as one text, moves the whitespace that ends a prompt into the answer, and
    lets the tokenizer put its start token before a chat prompt.
    """

    suite: FileSuite

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._answers: dict[str, str] = {}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers in order; a prompt that two suites ask, such as a table's form and its sums, is answered once."""
        keys = [self._key(*request.args) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._answers}
        found = super().generate_until(list(new.values()), disable_tqdm) if new else []
        self._answers |= zip(new, found, strict=True)
        return [self._answers[key] for key in keys]

    def _key(self, prompt: str, settings: dict[str, Any]) -> str:
        return json.dumps([context_ids(self.suite, prompt, self.tokenizer), settings], sort_keys=True)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """The ids of text without a prompt, before which the harness puts one start token."""
        ids = text_ids(self.tokenizer, string)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        answer = continued_ids(self.tokenizer, continuation) if context else text_ids(self.tokenizer, continuation)
        return context_ids(self.suite, context, self.tokenizer), answer

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and attention mask, each (prompts, longest), of prompts to be continued."""
        rows = [context_ids(self.suite, string, self.tokenizer)[-(left_truncate_len or 0) :] for string in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]
