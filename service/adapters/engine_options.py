"""Engine settings as operators write them, as numbers."""

from __future__ import annotations

import re

from service.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


def kv_budget(text: str) -> tuple[int | None, float | None]:
    """`engine.kv_memory` as (bytes, fraction of the free memory); both None for `auto`.

    `2GiB` and `1500000000` are sizes, a number below 1 is a fraction. Raises ConfigError for anything else.
    """
    value = text.strip().lower()
    if value == "auto":
        return None, None
    match = _SIZE.fullmatch(value)
    if match is not None and match[2] in _UNITS:
        number = float(match[1])
        if not match[2] and 0 < number < 1:
            return None, number
        if number * _UNITS[match[2]] >= 1:
            return int(number * _UNITS[match[2]]), None
    raise ConfigError(
        f"engine.kv_memory is {text!r}: write a size (2GiB), a fraction of the free memory (0.5), or auto.", param="engine.kv_memory"
    )
