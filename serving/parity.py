"""Whether the endpoint serves the model that was scored: teacher-forced log-probabilities, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openai import OpenAI

from serving.client import told_plainly
from training.errors import TenureError, fail
from training.evaluation.scorecard import Probe


@dataclass(frozen=True)
class Tolerance:
    """How far the endpoint may be from the artifact: at any one token and on average, in nats."""

    largest: float
    mean: float


@dataclass(frozen=True)
class Difference:
    """Absolute differences of log-probabilities between endpoint and artifact over all probes, in nats."""

    largest: float
    mean: float
    num_tokens: int


@dataclass(frozen=True)
class _Token:
    """One compared token: where it stands and what both sides say, in nats."""

    probe: int
    text: str
    position: int
    served: float
    expected: float

    @property
    def apart(self) -> float:
        apart = abs(self.served - self.expected)
        return apart if apart == apart else float("inf")  # a NaN agrees with nothing


def read_log_probs(client: OpenAI, model: str, token_ids: Sequence[int]) -> tuple[str, tuple[float, ...]]:
    """The prompt as text, and the log-probability of every token of it but the first, in nats.

    Works with any endpoint whose completions echo a prompt of token ids with its log-probabilities.

    Raises:
        TenureError: the endpoint cannot be reached, refuses, or gives another number of tokens.
    """
    with told_plainly(str(client.base_url)):
        reply = client.completions.create(model=model, prompt=list(token_ids), echo=True, logprobs=1, max_tokens=0)
    choice = reply.choices[0]
    log_probs = (choice.logprobs.token_logprobs if choice.logprobs else None) or []
    if len(log_probs) != len(token_ids):
        what = f"'{model}' gave log-probabilities for {len(log_probs)} of {len(token_ids)} prompt tokens"
        raise fail(what, str(client.base_url), "use an endpoint that supports echo with logprobs, as vLLM does")
    return choice.text, tuple(float("nan") if value is None else value for value in log_probs[1:])


def check_parity(client: OpenAI, model: str, probes: Sequence[Probe], tolerance: Tolerance) -> Difference:
    """How far a served model is from the probes of its artifact.

    Raises:
        TenureError: they are further apart than the tolerance, or there is nothing to compare.
    """
    tokens = [token for index, probe in enumerate(probes) for token in _compare(client, model, index, probe)]
    if not tokens:
        raise fail(f"the scorecard holds no probes for '{model}'", "", "score the run again, so that they are taken")
    worst = max(tokens, key=lambda token: token.apart)
    found = Difference(worst.apart, sum(token.apart for token in tokens) / len(tokens), len(tokens))
    if found.largest > tolerance.largest or found.mean > tolerance.mean:
        raise _mismatch(model, worst, found, tolerance)
    return found


def _compare(client: OpenAI, model: str, index: int, probe: Probe) -> list[_Token]:
    text, served = read_log_probs(client, model, probe.token_ids)
    pairs = zip(served, probe.log_probs, strict=True)
    return [_Token(index, text, position, *pair) for position, pair in enumerate(pairs, start=1)]


def _mismatch(model: str, worst: _Token, found: Difference, tolerance: Tolerance) -> TenureError:
    shown = worst.text if len(worst.text) <= 60 else worst.text[:57] + "..."
    what = (
        f"'{model}' as served is not the model that was scored: on probe {worst.probe}, {shown!r}, "
        f"the log-probability of token {worst.position} is {worst.served:.4f} from the endpoint "
        f"and {worst.expected:.4f} from the artifact; "
        f"they differ by {found.largest:.2g} at most ({tolerance.largest:g} allowed) "
        f"and {found.mean:.2g} on average ({tolerance.mean:g} allowed) over {found.num_tokens} tokens"
    )
    return fail(what, "", "serve the artifact that the scorecard belongs to, or score it again")
