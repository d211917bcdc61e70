"""What tests on a GPU need, and what to say where it is missing."""

from __future__ import annotations

import pytest
import torch

DEVICE = torch.device("cuda")


def missing() -> str | None:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA or ROCm (make TORCH=cuda installs a build with it)"
    if not torch.cuda.is_available():
        return "torch sees no GPU on this machine"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


needs_gpu = pytest.mark.skipif(missing() is not None, reason=missing() or "")
