"""A function of transformers that meets other functions under the names it calls: in one model, not in all of them."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any


def own_names(function: Any) -> dict[str, Any]:
    """The module's names as `function` sees them, without what decorates it."""
    names: dict[str, Any] = inspect.unwrap(function).__globals__
    return names


def rebound(function: Any, **names: Any) -> FunctionType:
    """`function`, without what decorates it, with other values for some of its module's names."""
    own: Any = inspect.unwrap(function)
    seen = {**own.__globals__, **names}
    other = FunctionType(own.__code__, seen, own.__name__, own.__defaults__, own.__closure__)
    other.__kwdefaults__ = own.__kwdefaults__
    return other
