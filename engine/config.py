"""How one engine is set up. Frozen; what is left at None is derived from the machine when the engine is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from engine.batch import ModelSpec

_PAGE = 1 << 21
"""Bytes of a large page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """`dtype` and `device` choose how the model is loaded (see `load_model`).

    The KV cache holds numbers of the model's type, or with `kv_dtype` "fp8" of float8_e4m3fn: half of bfloat16's bytes, for texts that
    are close to the model's and not always equal (see `engine.kv_scales`). It gets `kv_bytes`, or else `kv_fraction` of the memory that
    is free once the model is loaded. `drafter` is what a request's `auto` means: `auto`, `off`, a drafter's name, or the folder or id
    of one. `seed` makes unseeded sampling repeatable for the same requests in the same order on an otherwise equal run; None draws
    fresh entropy. `threads` bounds the CPU threads of the model.

    `adapt`: the DSpark or DFlash drafter in use learns from this engine's own answers beside the job, and goes on with the new weights
    where they draft better on answers that they did not learn from (`engine.training.adapt`).

    `fixed_drafts` verifies that many drafted tokens a request and step whatever they cost, with room for them beside `max_step_tokens`:
    for measurements. `trace` names a file that gets a record of everything the engine does (see `engine.lab.trace`), prompts and answers
    included.
    """

    dtype: str = "auto"
    device: str = "auto"
    kv_bytes: int | None = None
    kv_fraction: float | None = None
    kv_dtype: str = "auto"
    block_size: int = 16
    max_sequences: int | None = None
    max_step_tokens: int | None = None
    look_ahead: int = 64
    drafter: str = "auto"
    max_draft_tokens: int = 32
    share_prefixes: bool = True
    seed: int | None = None
    threads: int | None = None
    fixed_drafts: int | None = None
    trace: Path | None = None
    adapt: bool = False

    def __post_init__(self) -> None:
        positive = ("kv_bytes", "block_size", "max_sequences", "max_step_tokens", "max_draft_tokens", "threads", "fixed_drafts")
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.kv_dtype not in ("auto", "fp8"):
            raise ValueError(f"kv_dtype must be auto or fp8, got {self.kv_dtype!r}")
        if self.kv_fraction is not None and not 0.0 < self.kv_fraction <= 0.95:
            raise ValueError(f"kv_fraction must be in (0, 0.95], got {self.kv_fraction}")
        if self.look_ahead < 0:
            raise ValueError(f"look_ahead must not be negative, got {self.look_ahead}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What `EngineConfig` comes to for one model on one machine.

    max_step_tokens: drafts included. fixed_drafts: a sequence's, that have room in every step whatever else is in it.
    max_blocks: what `num_blocks` may grow to once no drafter keeps anything for them.
    """

    max_sequences: int
    max_step_tokens: int
    num_blocks: int
    block_bytes: int
    max_blocks: int
    fixed_drafts: int = 0


def derive_limits(config: EngineConfig, spec: ModelSpec, free_bytes: int, drafter_bytes_per_token: int = 0) -> Limits:
    """Sizes the batch and the KV cache. Raises ValueError where not even one sequence would fit the budget.

    Defaults: on two CPU cores throughput is level from 64 sequences on (140 ms a step at 64 rows, 259 at 128), so 64 there and 256
    on a GPU, where a wider batch still pays. The CPU shares its memory with everything else: a quarter of what is free, at
    most 4 GiB; a GPU gives 85%. Never more blocks than `max_sequences` full contexts can use. What drafters keep for each token of the KV
    cache (`drafter_bytes_per_token`) comes out of the same budget.
    """
    on_cpu = spec.device.type == "cpu"
    max_sequences = config.max_sequences or (64 if on_cpu else 256)
    fixed_drafts = config.fixed_drafts or 0
    max_step_tokens = max(config.max_step_tokens or (512 if on_cpu else 8192), max_sequences) + max_sequences * fixed_drafts
    token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * (1 if config.kv_dtype == "fp8" else spec.dtype.itemsize)
    block_bytes = (token_bytes + drafter_bytes_per_token) * config.block_size
    budget = config.kv_bytes
    if budget is None:
        budget = int(free_bytes * (config.kv_fraction or (0.25 if on_cpu else 0.85)))
        if on_cpu and config.kv_fraction is None:
            budget = min(budget, 4 << 30)
    useful = max_sequences * -(-spec.max_positions // config.block_size) + 1
    num_blocks = min(budget // block_bytes, useful)
    if num_blocks < 2:
        raise ValueError(f"a KV budget of {budget} bytes is too small: two blocks of {config.block_size} tokens take {2 * block_bytes}")
    max_blocks = num_blocks
    if on_cpu:
        # Pages are taken when they are first written (a GPU's are not), so the cache can be laid out for what it may become. But keys and
        # values of a layer that leave less than two pages free at their end share those with the next layer's, which are written.
        layer_bytes = token_bytes * config.block_size // (2 * spec.num_layers)
        larger = min(budget // (token_bytes * config.block_size), useful)
        if (larger - num_blocks) * layer_bytes >= 2 * _PAGE or num_blocks * layer_bytes < _PAGE:
            max_blocks = larger
    return Limits(max_sequences, max_step_tokens, num_blocks, block_bytes, max_blocks, fixed_drafts)
