"""JSON that any program reads: NaN and infinity become null, since JSON has neither."""

import json
import math
from collections.abc import Mapping
from typing import Any


def as_json(found: Any, indent: int | None = None) -> str:
    """JSON text, with null instead of NaN and infinity.

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
