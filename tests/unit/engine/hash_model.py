"""A target model without weights: the next token is a hash of the whole context, read back through the block tables.

Whatever goes wrong with slots, tables, positions, sharing or rollback changes the hash, so the tokens of every test below
depend on all of it, and equality is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.batch import ForwardBatch, ForwardOutput, ModelSpec

if TYPE_CHECKING:
    from engine.kv_pool import KVPool

VOCAB = 64
EOS = 63


def next_token(context: list[int], vocab: int = VOCAB, loop: int = 0) -> int:
    """What the model says after `context`. With `loop`, text repeats itself with that period, so lookups hit."""
    if loop and len(context) > 3 * loop:
        return context[-loop]
    value = 1469598103934665603
    for token in context[-7:]:
        value = (value ^ (token + 1)) * 1099511628211 % (1 << 64)
    value ^= sum(context) * 0x9E3779B97F4A7C15
    return (value >> 21) % (vocab - 1)


def continuation(prompt: tuple[int, ...], count: int, loop: int = 0) -> tuple[int, ...]:
    """The greedy answer."""
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(context, loop=loop))
    return tuple(context[len(prompt) :])


@dataclass
class HashModel:
    """Keeps positions and tokens in the place of keys and values, and reads contexts only through block tables, as attention would."""

    block_size: int = 4
    max_positions: int = 256
    loop: int = 0
    steps: list[int] = field(default_factory=list)
    poison: int | None = None

    def __post_init__(self) -> None:
        self.spec = ModelSpec(
            name="hash",
            revision="1",
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            hidden_size=8,
            vocab_size=VOCAB,
            max_positions=self.max_positions,
            eos_token_ids=(EOS,),
            dtype=torch.float32,
            device=torch.device("cpu"),
            parameter_bytes=0,
        )

    def forward(self, batch: ForwardBatch, kv: KVPool) -> ForwardOutput:
        tokens, positions, slots = batch.token_ids.tolist(), batch.positions.tolist(), batch.slots.tolist()
        starts = batch.query_start.tolist()
        self.steps.append(len(tokens))
        # Views: [block, offset].
        kept_positions, kept_tokens = kv.keys[0].numpy()[:, 0, :, 0], kv.values[0].numpy()[:, 0, :, 0]
        for token, position, slot in zip(tokens, positions, slots, strict=True):
            place = divmod(slot, self.block_size)
            kept_positions[place], kept_tokens[place] = 1 + position, token
        live = any(slot >= self.block_size for slot in slots)  # a profile writes into block 0 alone, and reads what was never written
        tables = batch.block_tables.numpy()
        if batch.shared_prefix_blocks:
            assert (tables[:, : batch.shared_prefix_blocks] == tables[0, : batch.shared_prefix_blocks]).all()
        owners = np.searchsorted(starts, np.arange(len(tokens)), side="right") - 1
        logits = torch.zeros(len(batch.logit_rows), VOCAB)
        for out, row in enumerate(batch.logit_rows.tolist()):
            owner = int(owners[row])
            context = []
            for position in range(positions[row] + 1):
                place = int(tables[owner, position // self.block_size]), position % self.block_size
                if place[0] and live:
                    assert kept_positions[place] == 1 + position
                context.append(int(kept_tokens[place]))
            logits[out, next_token(context, loop=self.loop)] = 5.0
            if self.poison is not None and self.poison in context:
                logits[out] = torch.nan
        hidden = batch.token_ids[:, None].float().expand(-1, 8)
        return ForwardOutput(logits, {tap: hidden + tap for tap in batch.taps})


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, token_ids: list[int], **_: object) -> str:
        return "".join(chr(48 + token) for token in token_ids)


@dataclass
class Loaded:
    model: HashModel
    tokenizer: Letters = field(default_factory=Letters)
