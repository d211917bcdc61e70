"""Keys made on the device are the host's."""

from __future__ import annotations

import numpy as np
import torch

from engine import noise as host
from kernels.reference import noise as device


def test_keys_and_uniforms_are_those_of_the_host() -> None:
    generator = np.random.default_rng(1)
    seeds = generator.integers(0, 2**64, 200, dtype=np.uint64)
    positions = generator.integers(0, 2**31, 200)
    for stream in host.Stream:
        expected = host.keys(seeds, positions, stream, attempt=98765)
        found = device.row_keys(torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(positions), int(stream), torch.tensor(98765))
        np.testing.assert_array_equal(found.numpy().view(np.uint64), expected)
        np.testing.assert_array_equal(device.uniform(found).numpy(), host.uniform(expected))
