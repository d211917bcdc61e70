"""Jobs of random prompts for a small target, and engines that run them with a drafter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.batch import TargetModel
from engine.config import EngineConfig
from engine.engine import Engine
from engine.types import Request, SamplingParams
from tests.unit.engine.drafters.layouts import VOCAB
from tests.unit.engine.hash_model import Letters


@dataclass
class Loaded:
    model: TargetModel
    tokenizer: Letters
    directory: Path | None = None


def jobs(count: int, **sampling: Any) -> list[Request]:
    rng = np.random.default_rng(4)
    shared = rng.integers(3, VOCAB, 13).tolist()
    made = []
    for number in range(count):
        prompt = shared[: int(rng.choice([0, 9, 13]))] + rng.integers(3, VOCAB, int(rng.integers(2, 9))).tolist()
        params = SamplingParams(**({"max_tokens": int(rng.integers(5, 22)), "temperature": 0.0, "ignore_eos": True} | sampling))
        made.append(Request(str(number), tuple(prompt), params))
    return made


def run(target: TargetModel, made: list[Request], drafter: str, directory: Path | None = None, **fields: Any) -> tuple[dict, Engine]:
    config = {"kv_bytes": 4 << 20, "block_size": 4, "max_step_tokens": 64, "max_draft_tokens": 6, "seed": 3, "max_sequences": 8} | fields
    engine = Engine(Loaded(target, Letters(), directory), EngineConfig(drafter=drafter, **config))
    return {result.id: result.token_ids for result in engine.run(iter(made))}, engine
