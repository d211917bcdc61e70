"""Engine settings as operators write them."""

import pytest

from service.adapters.engine_options import kv_budget
from service.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", (None, None)),
        ("2GiB", (2 << 30, None)),
        ("1.5 gb", (1_500_000_000, None)),
        ("512MiB", (512 << 20, None)),
        ("1500000000", (1_500_000_000, None)),
        ("0.5", (None, 0.5)),
        (" 0.25 ", (None, 0.25)),
    ],
)
def test_sizes_and_fractions(text, expected):
    assert kv_budget(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "2 parsecs", "0", "0GiB", "GiB", "1e9"])
def test_anything_else_is_refused_with_its_value(text):
    with pytest.raises(ConfigError, match="2GiB"):
        kv_budget(text)
