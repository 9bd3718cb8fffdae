"""Datasets of the Hugging Face hub: hf://OWNER/NAME[/CONFIG][:SPLIT], fetched once into the library's own cache."""

from __future__ import annotations

import re
from typing import Any

from training.errors import fail

_NAME = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")


def hub_files(url: str) -> list[tuple[str, str]]:
    """The Arrow files of a split in the cache of `datasets`, each as what to call it and its path.

    `datasets` asks the hub unless HF_HUB_OFFLINE=1.

    Raises:
        TenureError: the name is none, the hub has no such dataset or cannot be reached, or a split must be named.
    """
    match = _NAME.fullmatch(url)
    if not match:
        raise fail(f"{url} names no dataset", url, "write hf://OWNER/NAME, hf://OWNER/NAME/CONFIG:SPLIT or in between")
    splits = _load(url, match["name"], match["config"])
    split = match["split"] or (next(iter(splits)) if len(splits) == 1 else None)
    if split not in splits:
        what = f"there is no split {split}" if split else "the dataset has several splits"
        raise fail(f"{what}: it has {', '.join(splits)}", url, f"write {_with_split(url, next(iter(splits)))}")
    return [(_with_split(url, split), part["filename"]) for part in splits[split].cache_files]


def _with_split(url: str, split: str) -> str:
    return f"{url.rpartition(':')[0] if url.count(':') == 2 else url}:{split}"


def _load(url: str, name: str, config: str | None) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return dict(datasets.load_dataset(name, config))
    except (OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise fail(f"the hub gave no dataset: {reason}", url, _INSTEAD) from None


_INSTEAD = "check the name, or fetch it once where the hub is reachable, or give files of your own"
