"""Captured graphs against eager steps, on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.batch import ModelSpec
from engine.checkpoints.drafters import read_folder
from engine.checkpoints.loader import build_lean
from engine.drafters.base import Host, Progress
from engine.drafters.dspark import DSparkDrafter
from engine.drafters.eagle3 import Eagle3Drafter
from engine.graphs import CudaCapture, DirectCapture, GraphRunner
from engine.kv_pool import KVPool
from engine.pipeline import DecodePipeline
from engine.runner import PackedStep, Runner
from engine.tokenizer import Tokenizer
from kernels.reference.fp8_linear import Fp8Linear
from tests.benchmarks.gpu_decode import BlockDrafter
from tests.benchmarks.gpu_models import qwen3_config, random_model
from tests.gpu.requirements import DEVICE, needs_gpu
from tests.unit.engine.drafters.layouts import HIDDEN, deepspec, eagle, write
from tests.unit.engine.models.tiny import make_hf, make_lean

pytestmark = needs_gpu
BLOCK = 16


def pool(model, blocks: int = 200) -> KVPool:
    spec = model.spec
    return KVPool(spec.num_layers, blocks, BLOCK, spec.num_kv_heads, spec.head_dim, spec.dtype, DEVICE)


def mixed_step(generator: np.random.Generator, lengths: tuple[int, ...], counts: tuple[int, ...]) -> PackedStep:
    """Sequences whose last `counts` of `lengths` tokens are computed, all of them with logits."""
    tables = np.arange(1, 1 + len(lengths) * 8, dtype=np.int32).reshape(len(lengths), 8)
    positions = np.concatenate([np.arange(length - count, length) for length, count in zip(lengths, counts, strict=True)])
    owner = np.repeat(np.arange(len(lengths)), counts)
    total = sum(counts)
    return PackedStep(
        token_ids=generator.integers(3, 300, total),
        positions=positions,
        slots=tables[owner, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK,
        tables=tables,
        query_start=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        kv_lengths=np.array(lengths, np.int32),
        logit_rows=np.arange(total),
        row_starts=np.concatenate(([0], np.cumsum(counts)[:-1])),
        row_counts=np.array(counts),
        shared_prefix_blocks=0,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_slots_are_copied_as_on_a_cpu(dtype: torch.dtype) -> None:
    here, there = (KVPool(2, 6, BLOCK, 2, 8, dtype, device) for device in (DEVICE, torch.device("cpu")))
    for a, b in zip((*here.keys, *here.values), (*there.keys, *there.values), strict=True):
        b.copy_(torch.randn(b.shape))
        a.copy_(b)
    slots = torch.tensor([[17, 18, 33, 17], [33, 34, 50, 65]])
    here.copy(*slots.to(DEVICE))
    there.copy(*slots)
    for a, b in zip((*here.keys, *here.values), (*there.keys, *there.values), strict=True):
        assert torch.equal(a.cpu().float(), b.float())


def test_replayed_steps_equal_eager_ones() -> None:
    model = random_model(qwen3_config(tiny=True), DEVICE)
    plain, graphs = Runner(model, pool(model)), GraphRunner(model, pool(model), 8)
    generator = np.random.default_rng()
    for lengths, counts in (((20, 9, 33), (20, 9, 33)), ((21, 10, 34), (1, 1, 1)), ((25, 12, 35), (4, 2, 1)), ((26, 14, 41), (1, 2, 6))):
        step = mixed_step(generator, lengths, counts)
        for _ in range(2):  # the first captures
            torch.testing.assert_close(graphs.run(step).logits, plain.run(step).logits, rtol=0.02, atol=0.02)
    assert graphs.eager_steps == 0


def test_an_fp8_checkpoint_keeps_its_weights_and_gives_the_logits_of_wide_ones() -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        vocab_size=300, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    stored: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        value = torch.randn(shape) * 0.06 + (len(shape) == 1)
        if name.endswith("_proj.weight"):
            stored[f"{name}_scale_inv"] = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) * 0.02 + 0.01
            value = (value / 0.02).to(torch.float8_e4m3fn)
        stored[name] = value
    logits = []
    for place, dtype in ((DEVICE, torch.bfloat16), (torch.device("cpu"), torch.float32)):

        def spec(num_kv_heads: int, head_dim: int, parameters: int, place=place, dtype=dtype) -> ModelSpec:
            return ModelSpec("fp8", "0", 2, num_kv_heads, head_dim, 256, 300, 256, (), dtype, place, parameters)

        model = build_lean({name: tensor.clone().to(place) for name, tensor in stored.items()}, config, spec)
        kv = KVPool(2, 40, BLOCK, 2, 64, dtype, place)
        runner = GraphRunner(model, kv, 8) if place == DEVICE else Runner(model, kv)
        step = mixed_step(np.random.default_rng(5), (20, 9, 33), (20, 9, 33))
        logits.append(torch.log_softmax(runner.run(step).logits, 1).cpu())
        assert isinstance(model._weights.layers[0].down, Fp8Linear) == (place == DEVICE)
    assert (logits[0] - logits[1]).abs().mean() < 0.05 * logits[1].std()


@pytest.mark.parametrize("drafts", [0, 7])
def test_a_captured_pipeline_makes_what_an_eager_one_makes(drafts: int) -> None:
    model, small = random_model(qwen3_config(tiny=True), DEVICE), random_model(qwen3_config(tiny=True, layers=1), DEVICE)
    made = []
    for capture in (DirectCapture(), CudaCapture(DEVICE)):
        torch.manual_seed(3)
        drafter = BlockDrafter(small, pool(small), 4) if drafts else None
        pipeline = DecodePipeline(model, pool(model), slots=4, width=8, capture=capture, max_drafts=drafts, drafter=drafter)
        for slot in range(4):
            pipeline.enter(slot, last=5 + slot, length=0, left=20, blocks=list(range(1 + 8 * slot, 9 + 8 * slot)))
        held = []
        for step in range(20):
            pipeline.launch((7, 3, 0)[step % 3] if drafts else None)
            # Takes small memory that a capture forgot to keep: with a budget of 99 drafts there are more rows than a step has.
            held.append(torch.full((1,), 99, dtype=torch.int64, device=DEVICE))
        results = [pipeline.collect() for _ in range(20)]
        made.append([[token for r in results for token in r.tokens[slot, : r.counts[slot]].tolist()] for slot in range(4)])
    assert made[0] == made[1]
    assert all(len(tokens) == 20 for tokens in made[0])


def test_a_captured_pipeline_drafts_what_an_eager_one_drafts(tmp_path: Path) -> None:
    hf = make_hf("qwen3", max_position_embeddings=128)
    folder = write(tmp_path / "drafter", *deepspec(make_lean(hf)))
    model = make_lean(hf, DEVICE)
    made = []
    for capture in (DirectCapture(), CudaCapture(DEVICE)):
        host = Host(model, Tokenizer(SimpleNamespace()), None, 40, BLOCK, 8, 5)
        drafter = DSparkDrafter.load(read_folder(folder), host).on_device(4)
        pipeline = DecodePipeline(model, pool(model, 40), slots=4, width=8, capture=capture, max_drafts=5, drafter=drafter)
        for slot in range(3):
            seed = {"seed": 3 * slot, "temperature": 0.8} if slot else {}
            pipeline.enter(slot, last=5 + slot, length=0, left=30, blocks=list(range(1 + 8 * slot, 9 + 8 * slot)), **seed)
        for step in range(20):
            drafter.trust(np.linspace(-1.4, 2.2, len(drafter._logits)), np.zeros(4), np.full(4, 1.0 + step % 2))
            pipeline.launch((5, 1, 0, 3)[step % 4])
        results = [pipeline.collect() for _ in range(20)]
        made.append([(r.counts.tolist(), r.drafts[:3].tolist(), r.bins[:3].tolist(), r.verified.tolist()) for r in results])
        assert any(r.verified.sum() for r in results)
    assert made[0] == made[1]


@pytest.mark.parametrize("kind", [DSparkDrafter, Eagle3Drafter])
def test_a_drafter_takes_in_what_it_is_shown_without_waiting_for_the_device(tmp_path: Path, kind: type) -> None:
    """A step that is launched before the one before it is read is shown to drafters at once: to wait for it then is to lose that."""
    hf = make_hf("qwen3", max_position_embeddings=128)
    layout = deepspec(make_lean(hf)) if kind is DSparkDrafter else eagle("original")
    host = Host(make_lean(hf, DEVICE), Tokenizer(SimpleNamespace()), None, 40, BLOCK, 8, 5)
    drafter = kind.load(read_folder(write(tmp_path / "drafter", *layout)), host)
    taps = {tap: torch.randn(6, HIDDEN, device=DEVICE) for tap in drafter.taps}
    progress = Progress([], np.array([0, 6], np.int32), np.array([5]), np.arange(6), np.arange(BLOCK, BLOCK + 6), taps)
    drafter.observe(progress)  # compiles what it launches
    torch.cuda.set_sync_debug_mode("error")
    try:
        drafter.observe(progress)
    finally:
        torch.cuda.set_sync_debug_mode("default")
