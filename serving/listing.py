"""GET /v1/models: the names that a key may use."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

from serving.access import check_model
from serving.catalog import Catalog, Served
from serving.keys import Key
from serving.refusals import Refusal

_LIST = "/v1/models"


def list_models(catalog: Catalog, key: Key | None, path: str) -> bytes:
    """All models that the key may use, or the one that the path names, as OpenAI describes them.

    Raises:
        Refusal: 404 or 403.
    """
    if path == _LIST:
        names = [name for name in catalog.names if key is None or key.may_use(name)]
        return json.dumps({"object": "list", "data": [_card(catalog, name) for name in names]}).encode()
    name = unquote(path.removeprefix(f"{_LIST}/"))
    if name not in catalog.names:
        raise Refusal(404, f"the model '{name[:100]}' does not exist", "model_not_found", "model")
    check_model(key, name)
    return json.dumps(_card(catalog, name)).encode()


def _card(catalog: Catalog, name: str) -> dict[str, Any]:
    alias = catalog.aliases.get(name)
    model: Served = catalog.models[alias.current if alias else name]
    card: dict[str, Any] = {"id": name, "object": "model", "created": model.created, "owned_by": "tenure"}
    card["parent"] = model.base
    card["root"] = model.name
    return card
