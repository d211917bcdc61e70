"""Kernels compile for devices that are not there. All of them: `make acceptance ONLY=kernels`."""

from __future__ import annotations

import pytest

import kernels
from tests.unit.kernels.triton.ahead_of_time import REQUIRED, compiling_for, programs


@pytest.mark.parametrize("target", REQUIRED)
@pytest.mark.parametrize("name", ["attention decode", "rotary_kv_write fp8", "add_rms_norm", "allocate_top"])
def test_a_sample_compiles_to_machine_code(name: str, target: str) -> None:
    with compiling_for(target) as found:
        programs()[name]()
    assert found
    assert min(found.values()) > 1000


def test_every_op_is_among_the_programs() -> None:
    # rotary_kv_write has kv_write's kernel, and every attention has a plan
    named = {name.split()[0] for name in programs()} | {"kv_write", "paged_attention", "plan_attention"}
    assert named == set(kernels.TRITON_OPS)
