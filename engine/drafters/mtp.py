"""The target's own multi-token-prediction head (DeepSeek-V3, arXiv 2412.19437, section 2.2; GLM-4.5), run once for each draft."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import kernels
from engine.batch import NORMALISED
from engine.checkpoints.drafters.errors import DrafterError
from engine.drafters.parts.feature_chain import FeatureChain
from engine.drafters.parts.layers import Weights
from engine.drafters.parts.private_kv import PrivateCache
from engine.models.fallback import paged_layer

if TYPE_CHECKING:
    from engine.batch import ForwardBatch
    from engine.checkpoints.drafters.mtp import MtpHeads
    from engine.drafters.base import Host
    from engine.kv_pool import KVPool

_OWN = ("enorm.", "hnorm.", "eh_proj.", "shared_head.", "embed_tokens.")


class MtpCore:
    """The first head's pass; see `FeatureCore`. Its layer is transformers' own, behind our paged attention."""

    taps: tuple[int, ...] = (NORMALISED,)

    def __init__(self, heads: MtpHeads, host: Host) -> None:
        from transformers import AutoConfig

        target = host.target.spec
        tensors = heads.tensors()
        weights = Weights(tensors, target.dtype, target.device)
        config = AutoConfig.from_pretrained(heads.directory, trust_remote_code=False)
        self._eps = float(config.rms_norm_eps)
        self._norms = [weights.take(f"{name}.weight") for name in ("enorm", "hnorm", "shared_head.norm")]
        self._join = weights.linear("eh_proj")
        self._frozen = host.target.frozen()
        self._embedding = weights.maybe("embed_tokens.weight")
        self._head = weights.linear("shared_head.head") if "shared_head.head.weight" in tensors else None
        layer = {name: tensor for name, tensor in tensors.items() if not name.startswith(_OWN)}
        try:
            self._layer = paged_layer(config, layer, dtype=target.dtype, device=target.device)
        except (KeyError, RuntimeError, ValueError) as error:
            raise DrafterError(f"the MTP head of {heads.model_type} does not fit its layer: {error}") from error
        self.width = int(config.hidden_size)
        self.cache = PrivateCache(1, host.num_blocks, host.block_size, target.num_kv_heads, target.head_dim, target.dtype, target.device)

    def feature(self, taps: list[torch.Tensor]) -> torch.Tensor:
        return taps[0]

    def forward(self, features: torch.Tensor, batch: ForwardBatch, kv: KVPool) -> torch.Tensor:
        embedding = self._frozen.embedding if self._embedding is None else self._embedding
        enorm, hnorm, _ = self._norms
        embedded = kernels.rms_norm(embedding.index_select(0, batch.token_ids), enorm, self._eps)
        joined = torch.cat((embedded, kernels.rms_norm(features, hnorm, self._eps)), dim=-1)
        return self._layer(kernels.linear(joined, self._join), batch, kv)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        normed = kernels.rms_norm(features, self._norms[2], self._eps)
        return self._frozen.head(normed) if self._head is None else kernels.linear(normed, self._head).float()


class MtpDrafter(FeatureChain):
    """The first head drafts every token: from its own features where the target's do not reach yet."""

    @classmethod
    def load(cls, heads: MtpHeads, host: Host) -> MtpDrafter:
        """Raises DrafterError by the model's name where its heads cannot run here."""
        heads.refuse_unless_runnable()
        return cls("mtp", MtpCore(heads, host), host, None)
