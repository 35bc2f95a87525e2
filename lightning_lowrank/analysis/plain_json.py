"""JSON that any program reads: what does not exist is null, as JSON has no NaN."""

import json
import math
from collections.abc import Mapping
from typing import Any


def as_json(found: Any, indent: int | None = None) -> str:
    """What is found, with null in the place of numbers that are NaN or infinite.

    Examples:
        >>> as_json({"loss": [1.0, math.nan]})
        '{"loss": [1.0, null]}'
    """
    return json.dumps(_plain(found), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
