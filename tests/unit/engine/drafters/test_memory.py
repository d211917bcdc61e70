"""What a drafter keeps, and what it takes to make one: its weights, and context that costs memory once it is written."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from engine.batch import FrozenParts, TargetModel
from engine.checkpoints.drafters import read_folder
from engine.drafters import dspark
from engine.drafters.base import DraftBatch
from engine.drafters.dspark import DSparkDrafter
from engine.drafters.parts.block import BlockBackbone
from engine.drafters.parts.frozen import vocabulary
from engine.drafters.parts.layers import Weights
from engine.types import SamplingParams
from tests.unit.engine.drafters.layouts import HIDDEN, Scene, deepspec, without_anchors, write
from tests.unit.engine.models.tiny import CHUNKED, make_hf, make_lean

MIB = 1 << 20


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return make_lean(make_hf("qwen3"))


def resident(tensor: torch.Tensor) -> int:
    """Bytes of `tensor` that have memory: the system's word, by page."""
    page = mmap.PAGESIZE
    count = -(-tensor.nbytes // page)
    held = (ctypes.c_ubyte * count)()
    start = tensor.data_ptr() // page * page
    assert ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(start), ctypes.c_size_t(count * page), held) == 0, ctypes.get_errno()
    return page * sum(number & 1 for number in held)


@pytest.mark.parametrize("first_blocks", [0, 20_000])
def test_context_takes_memory_as_it_is_written(tmp_path: Path, target: TargetModel, first_blocks: int) -> None:
    scene = Scene(target)
    spec = DSparkDrafter.load(read_folder(write(tmp_path / "d", *deepspec(target))), scene.host).spec
    weights = Weights(deepspec(target)[1], torch.float32, torch.device("cpu"))
    blocks, size = 80_000, 16
    backbone = BlockBackbone(spec, weights, num_blocks=blocks, block_size=size, first_blocks=first_blocks)
    each = backbone.nbytes // (2 * len(backbone._keys))
    caches = [*backbone._keys, *backbone._values]
    assert each > 32 * MIB
    for cache in caches:
        assert resident(cache) <= each * first_blocks / blocks + 4 * MIB
        assert resident(cache) >= each * first_blocks / blocks
    slots = torch.arange(blocks * size // 2, blocks * size // 2 + 8)
    backbone.take_in([torch.randn(8, HIDDEN) for _ in spec.taps], torch.arange(8), slots)
    for cache in caches:
        assert resident(cache) > each * first_blocks / blocks
        assert cache[slots].abs().sum() > 0


@pytest.mark.parametrize(("rows", "bits"), [(4000, 32), (5000, 8)])
def test_a_drafter_that_is_read_from_memory_has_its_products_in_eight_bits(rows: int, bits: int) -> None:
    """All its weights count: 8 MiB are many."""
    tensors = {name: torch.randn(rows, 256) for name in ("up.weight", "gate.weight")}
    weights = Weights(tensors, torch.float32, torch.device("cpu"))
    x = torch.randn(3, 256)
    up, gate = (x @ tensors[name].T for name in ("up.weight", "gate.weight"))
    for packed, found, wanted in (
        (linear := weights.linear("up"), kernels.linear(x, linear), up),
        (gated := weights.gated("gate", "up", "silu"), kernels.gated_linear(x, gated, "silu"), torch.nn.functional.silu(gate) * up),
    ):
        assert packed.weight.dtype == {8: torch.int8, 32: torch.float32}[bits]
        error = (found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error < {8: 2e-2, 32: 1e-6}[bits]


@pytest.mark.parametrize("rows", [8000, 9000])
def test_a_large_head_that_the_target_has_in_eight_bits_is_not_kept_again(rows: int) -> None:
    """8 MiB is large; a smaller head is read as it is."""
    embedding = torch.zeros(rows, 256)
    frozen = FrozenParts(embedding, lambda x: x, lambda x: x @ embedding.T, rough_head=lambda x: x @ embedding.T + 1.0)
    made = vocabulary(Weights({"norm.weight": torch.ones(256)}, torch.float32, torch.device("cpu")), frozen)
    found = made.head(torch.ones(2, 256))
    assert found.shape == (2, rows)
    assert (found == (1.0 if rows == 9000 else 0.0)).all()


MADE = """
import resource
from pathlib import Path
import torch
torch.set_num_threads(1)
import kernels
from engine.batch import FrozenParts
from engine.drafters.parts.frozen import vocabulary
from engine.drafters.parts.frozen import vocabulary
from engine.drafters.parts.layers import Weights

def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def peak():  # since `forget_peak`; ru_maxrss would be that of the process that forked this one, where that is larger
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")

width, vocab = 256, 1 << 17
embedding = torch.randn(vocab, width)
packed = kernels.pack_linear(embedding)
frozen = FrozenParts(embedding, lambda hidden: hidden, lambda hidden: kernels.linear(hidden, packed).float())
own = Weights({"norm.weight": torch.ones(width)}, torch.float32, torch.device("cpu"))
vocabulary(own, FrozenParts(embedding[:9000], frozen.norm, lambda hidden: frozen.head(hidden)[:, :9000]))  # compiles kernels
before = memory()
forget_peak()
made = vocabulary(own, frozen)
print(embedding.nbytes, memory() - before, peak() - before)
"""


def test_a_head_in_eight_bits_leaves_nothing_else_behind() -> None:
    """A head of 128 MiB: a quarter stays. Meanwhile there are its rows, read back, and no further copy as wide (five there once were).

    The allocator gives back at once what is freed: what it would keep for later differs from run to run.
    """
    at_once = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", textwrap.dedent(MADE)]
    done = subprocess.run(command, env={**os.environ, **at_once}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, kept, most = map(int, done.stdout.split()[-3:])
    assert whole == 128 * MIB
    assert kept <= 0.4 * whole
    assert most <= 1.5 * whole


def count_rows(head: Callable[[torch.Tensor], torch.Tensor], sizes: list[int], hidden: torch.Tensor) -> torch.Tensor:
    sizes.append(len(hidden))
    return head(hidden)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_a_few_sequences_at_a_time_draft_the_same(
    tmp_path: Path, target: TargetModel, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    folder = write(tmp_path / "d", *deepspec(target, "rnn", 8))
    found = []
    for most in (1 << 30, 1):
        monkeypatch.setitem(dspark._LOGIT_BYTES, "cpu", most)
        scene = Scene(target, sampling=SamplingParams(max_tokens=40, temperature=temperature))
        drafter = DSparkDrafter.load(read_folder(folder), scene.host)
        scene.feed(drafter, without_anchors(CHUNKED))
        sizes: list[int] = []
        drafter._vocabulary = replace(drafter._vocabulary, head=partial(count_rows, drafter._vocabulary.head, sizes))
        found.append((drafter.propose_scored(DraftBatch(scene.sequences, np.array([5, 5, 5]), 1)), sizes))
    (together, wide), (apart, narrow) = found
    assert (wide, narrow) == ([15], [5, 5, 5])
    assert np.array_equal(together[0].token_ids, apart[0].token_ids)
    assert np.allclose(together[1], apart[1], atol=1e-5)
    if temperature:
        assert together[0].probabilities is not None
        assert apart[0].probabilities is not None
        assert torch.allclose(together[0].probabilities, apart[0].probabilities, atol=1e-6)
