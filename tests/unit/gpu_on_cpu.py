"""A pytest plugin: `tests/gpu` without a GPU, a call in place of each capture, so that its tests do not rot where no GPU is at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import engine.checkpoints.loader as loader
import engine.engine as engine_module
import tests.gpu.requirements as requirements
from engine.graphs import DirectCapture, GraphRunner

CPU = torch.device("cpu")
requirements.DEVICE = CPU
requirements.needs_gpu = pytest.mark.filterwarnings("default")  # a mark that does nothing

_init = GraphRunner.__init__


def _with_calls(self: GraphRunner, model: Any, kv: Any, sequences: int, capture: Any = None, memory: int | None = None) -> None:
    _init(self, model, kv, sequences, capture or DirectCapture(), 1 << 30 if memory is None else memory)


GraphRunner.__init__ = _with_calls  # type: ignore[method-assign]
engine_module.make_runner = GraphRunner  # type: ignore[assignment]
loader.multiplies_fp8 = lambda device: True
torch.cuda.set_sync_debug_mode = lambda mode: None  # type: ignore[assignment]
