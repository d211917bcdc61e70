"""Multi-token-prediction heads that lie inside a target's own checkpoint, by config keys and tensor names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.checkpoints.drafters.check import check_tensors
from engine.checkpoints.drafters.errors import DrafterError
from engine.checkpoints.drafters.keys import integer
from engine.checkpoints.tensors import read_tensors

if TYPE_CHECKING:
    from pathlib import Path

    import torch

NEXTN, QWEN, DSPARK_V4 = "nextn", "qwen-mtp", "deepseek-v4-dspark"
_RUNNABLE = ("glm4_moe",)
"""Model types whose heads run: their target does, too, and their layer keeps keys and values like any other."""


@dataclass(frozen=True, slots=True)
class MtpHeads:
    """layout: `nextn` (DeepSeek-V3, GLM-4.5, Step), `qwen-mtp` (Qwen3-Next, 3.5) or `deepseek-v4-dspark`. count: heads or layers.

    prefix: of the first head's tensors.
    """

    layout: str
    model_type: str
    count: int
    prefix: str
    directory: Path
    config: dict[str, Any]

    @property
    def bytes_per_token(self) -> int:
        """Numbers (not bytes) of features, keys and values; the caller multiplies with the size of one."""
        heads = int(self.config.get("num_key_value_heads") or self.config.get("num_attention_heads") or 1)
        return int(self.config.get("hidden_size", 0)) + 2 * heads * int(self.config.get("head_dim") or 0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The heads' tensors without `prefix` for `nextn` (of its first head), else by their whole names.

        Raises DrafterError for what is missing or mis-shaped among the parts that every head has.
        """
        found = {name: tensor for name, tensor in read_tensors(self.directory).items() if name.startswith(_families(self))}
        if self.layout == NEXTN:
            found = {name.removeprefix(self.prefix): tensor for name, tensor in found.items() if name.startswith(self.prefix)}
        common = _common(self)
        check_tensors({name: found[name] for name in found if name in common}, common, {}, self.layout)
        return found

    def refuse_unless_runnable(self) -> None:
        """Raises DrafterError by the model's name where the heads cannot run."""
        if self.layout == NEXTN and self.model_type in _RUNNABLE:
            return
        reasons = {
            QWEN: "the target's linear-attention layers keep state that rejected drafts could not be taken back from",
            DSPARK_V4: "the target uses multi-head latent attention, whose cache holds no separate keys and values",
        }
        mla = "the target uses multi-head latent attention, whose cache holds no separate keys and values"
        reason = reasons.get(self.layout) or (mla if self.config.get("kv_lora_rank") else "its layer is not one that runs here")
        raise DrafterError(f"{self.model_type} has {self.count} MTP heads of layout {self.layout}, but they cannot run: {reason}")


def mtp_heads(directory: Path) -> MtpHeads | None:
    """The heads that a checkpoint's config promises, None for none. Raises DrafterError where a key is wrong."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    inner = config.get("text_config") or config
    kind = str(inner.get("model_type", "unknown"))
    if inner.get("dspark_block_size"):
        return MtpHeads(DSPARK_V4, kind, integer(inner, "num_nextn_predict_layers", 3, least=1), "mtp.0.", directory, inner)
    if inner.get("mtp_num_hidden_layers"):
        return MtpHeads(QWEN, kind, integer(inner, "mtp_num_hidden_layers", least=1), "mtp.", directory, inner)
    if inner.get("num_nextn_predict_layers"):
        first = integer(inner, "num_hidden_layers", least=1)
        count = integer(inner, "num_nextn_predict_layers", least=1)
        heads = MtpHeads(NEXTN, kind, count, f"model.layers.{first}.", directory, inner)
        # A checkpoint may keep the key and leave the tensors out.
        return heads if any(name.startswith(heads.prefix) for name in read_tensors(directory)) else None
    return None


def _families(heads: MtpHeads) -> tuple[str, ...]:
    if heads.layout != NEXTN:
        return ("mtp.",)
    first = int(heads.config["num_hidden_layers"])
    return tuple(f"model.layers.{first + index}." for index in range(heads.count))


def _common(heads: MtpHeads) -> dict[str, tuple[int, ...]]:
    hidden = integer(heads.config, "hidden_size", least=1)
    if heads.layout == NEXTN:
        shapes: dict[str, tuple[int, ...]] = {"enorm.weight": (hidden,), "hnorm.weight": (hidden,), "eh_proj.weight": (hidden, 2 * hidden)}
        return shapes | {"shared_head.norm.weight": (hidden,)}
    if heads.layout == QWEN:
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        return {f"mtp.{name}.weight": (hidden,) for name in norms} | {"mtp.fc.weight": (hidden, 2 * hidden)}
    return {}
