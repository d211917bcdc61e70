"""What the cases of several ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Results = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
HALF_TYPES = (torch.float16, torch.bfloat16)


def double(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.double() if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float8_e4m3fn else tensor
