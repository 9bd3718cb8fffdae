"""Fills Jinja templates with the columns of a row, in a sandbox."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from training.data.row import MAX_ROW_BYTES, LastFault, Row, RowFault
from training.data.timelimit import time_limit


def fill(column: str, row: Row) -> str:
    """The text of a column, or of a Jinja template over the columns when it holds `{{`."""
    if "{{" in column:
        return _fill_template(column, row)
    value = column_of(column, row)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise RowFault(f"'{column}' is {kind}, not text", "quote it, or use a template")
    return value


def fill_text(text: str, row: Row) -> str:
    """A text as it stands, or filled with columns where it holds `{{`."""
    return _fill_template(text, row) if "{{" in text else text


def column_of(name: str, row: Row) -> Any:
    """A column's value; a fault of the row where there is none."""
    if name not in row:
        raise RowFault(f"there is no column '{name}'", f"columns here: {', '.join(row)}")
    return row[name]


MAX_SECONDS = 5.0


def _fill_template(source: str, row: Row) -> str:
    try:
        with time_limit(MAX_SECONDS):
            return _template(source).render(row)
    except TimeoutError as error:  # with other rows it would take as long
        raise LastFault(f"the template {source!r} failed: {error}", "write one that loops less") from None
    except (TemplateError, *_TEMPLATE_FAULTS) as error:
        reason = str(error) or type(error).__name__
        raise RowFault(f"the template {source!r} failed: {reason}", f"columns here: {', '.join(row)}") from None


# What an expression over a row's values can raise beside Jinja's own errors.
_TEMPLATE_FAULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no product grows without bound: one operation alone could fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The product, unless it is a power, or a text or list of more than a row's length."""
        if operator == "**":
            raise ValueError("powers are not computed in templates")
        size = len(left) * right if hasattr(left, "__len__") else len(right) * left if hasattr(right, "__len__") else 0
        if size > MAX_ROW_BYTES:
            raise ValueError(f"a product of {size} elements is longer than a row may be")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=64)
def _template(source: str) -> Template:
    """A sandboxed template; without Jinja's globals (range among them) it can only loop over what a row holds."""
    environment = _Sandbox(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.globals.clear()
    return environment.from_string(source)
