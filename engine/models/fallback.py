"""Any decoder-only transformers model, run as it is, with our paged attention behind its attention interface.

Slower than the lean decoder (nothing is fused), but the model's code is transformers' own. What would not be exact is refused by
name at load: before a model is accepted, a short text goes through it twice, once in transformers' own way
and once in two steps through the paged cache, and the logits must agree.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

import kernels
from engine.batch import NORMALISED, ForwardBatch, ForwardOutput, FrozenParts, ModelSpec
from engine.checkpoints.tensors import weight_files
from engine.kv_pool import KVPool
from engine.models.refusals import refuse

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kernels.native.attention_plan import NativePlan
    from kernels.reference.attention_plan import AttentionPlan

_INTERFACE = "longdraft_paged"
_OBSERVER = "longdraft_observer"
_PROBE_TOKENS = 12
_PROBE_SPLIT = 7
_PROBE_TOLERANCE = 1e-3
"""Relative to the largest logit, in float32. Honest differences are below 1e-5; a missing feature shows at 1e-2 and above."""

_IGNORED_ARGUMENTS = frozenset({"dropout", "is_causal", "position_ids", "cache_position", "use_cache", "training"})
"""Attention arguments that say nothing the step's plan does not know; so do those that ask for `output_...`."""


@dataclass(slots=True)
class _Step:
    """What the attention function needs to know of the running step. plans: by window."""

    batch: ForwardBatch
    kv: KVPool
    plans: dict[int | None, AttentionPlan | NativePlan]
    layers_seen: set[int]
    windows_seen: set[int]

    def plan(self, num_heads: int, window: int | None) -> AttentionPlan | NativePlan:
        key = None if window is None or window >= self.batch.max_kv else window
        if key not in self.plans:
            batch = self.batch
            self.plans[key] = kernels.plan_attention(
                batch.block_tables,
                batch.query_start,
                batch.kv_lengths,
                batch.slots,
                cache=self.kv.keys[0],
                num_heads=num_heads,
                window=key,
            )
        return self.plans[key]


_step: ContextVar[_Step] = ContextVar("longdraft_step")


def _paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - the plan knows who sees what
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim]."""
    _refuse_unknown(others)
    step = _step.get()
    index = module.layer_idx
    cache_shape = step.kv.keys[0].shape
    if (key.shape[1], key.shape[3]) != (cache_shape[1], cache_shape[3]):
        raise ValueError(f"layer {index} has {key.shape[1]} key heads of {key.shape[3]}, others {cache_shape[1]} of {cache_shape[3]}")
    step.layers_seen.add(index)
    if sliding_window is not None:
        step.windows_seen.add(sliding_window)
    plan = step.plan(query.shape[1], sliding_window)
    keys, values = step.kv.keys[index], step.kv.values[index]
    kernels.kv_write(key[0].transpose(0, 1), value[0].transpose(0, 1), keys, values, plan)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = kernels.attention(query[0].transpose(0, 1), keys, values, plan, scale, softcap)
    return out.unsqueeze(0), None


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    unknown = [name for name, given in arguments.items() if given is not None and given is not False]
    unknown = [name for name in unknown if name not in _IGNORED_ARGUMENTS and not name.startswith("output_")]
    if unknown:
        raise ValueError(f"its attention needs {', '.join(sorted(unknown))}, which paged attention does not provide")


def _register(name: str, attention: Callable[..., Any]) -> None:
    """Makes `attention` known to transformers; no mask is built for it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *_, **__: None)


class FallbackModel:
    """A `TargetModel` (engine.batch) round a transformers model."""

    def __init__(self, spec: ModelSpec, hf: Any) -> None:
        self.spec = spec
        self._hf = hf

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVPool) -> ForwardOutput:
        """See `TargetModel.forward`. Raises ValueError for a tap after the last layer, which transformers hands out normalised."""
        if any(tap >= self.spec.num_layers for tap in batch.taps):
            raise ValueError(f"this model gives taps 0 to {self.spec.num_layers - 1}, asked for {max(batch.taps)}")
        out, _ = self.run(batch, kv)
        # transformers hands out the last layer's states normalised, so its -1 is ours.
        assert NORMALISED == -1
        return ForwardOutput(out.logits[0].float(), {tap: out.hidden_states[tap][0] for tap in batch.taps})

    def frozen(self) -> FrozenParts:
        """See `TargetModel.frozen`. Raises ValueError where the final norm is not where transformers usually has it."""
        norm = getattr(self._hf.base_model, "norm", None)
        if norm is None:
            raise ValueError(f"{self._hf.config.model_type} has no final norm by that name, so drafters that need it cannot run on it")
        head = self._hf.get_output_embeddings()
        return FrozenParts(self._hf.get_input_embeddings().weight, norm, lambda hidden: head(hidden).float())

    def run(self, batch: ForwardBatch, kv: KVPool) -> tuple[Any, _Step]:
        """One transformers forward with the paged attention in place: its output, and what the attention saw."""
        step = _Step(batch, kv, {}, set(), set())
        wanted = {"output_hidden_states": True} if batch.taps else {}
        token = _step.set(step)
        try:
            out = self._hf(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=batch.logit_rows,
                **wanted,
            )
        finally:
            _step.reset(token)
        return out, step


def load_fallback(directory: Path, config: Any, make_spec: Callable[..., ModelSpec]) -> FallbackModel:
    """Loads any other decoder-only model. `make_spec` as in `engine.checkpoints.loader.build_lean`.

    Raises ValueError with the reason for a model that cannot run: encoder-decoders, recurrent or hybrid layers, attention that needs
    more than queries, keys, values, a window and a soft cap, or code that is not part of transformers.
    """
    from transformers import AutoModelForCausalLM

    weight_files(directory)  # refuses pickles and missing shards by name
    hf, report = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        attn_implementation="eager",
    )
    report["unexpected_keys"] = [name for name in report["unexpected_keys"] if not name.startswith(_prediction_heads(config))]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"the checkpoint has {kind.replace('_', ' ')}: {', '.join(map(str, sorted(report[kind])[:6]))}")
    return wrap_model(hf, make_spec)


def paged_layer(
    config: Any, tensors: dict[str, torch.Tensor], *, dtype: torch.dtype, device: torch.device
) -> Callable[[torch.Tensor, ForwardBatch, KVPool], torch.Tensor]:
    """A decoder layer of this model type by itself: hidden [T, hidden], batch and a cache of one layer -> hidden [T, hidden].

    tensors: by the layer's own names, experts fused or one by one. Raises RuntimeError (torch's) naming tensors that do not fit.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config).base_model
    config._attn_implementation = _INTERFACE
    _register(_INTERFACE, _paged_attention)
    layer = type(empty.layers[-1])(config, config.num_hidden_layers - 1)
    layer.load_state_dict(_fuse_experts(tensors))
    layer.self_attn.layer_idx = 0
    exact = {name for name, _ in layer.named_buffers()}
    layer.to(device=device, dtype=dtype).eval()
    for name in exact:  # routing biases stay exact, as in the whole model
        layer.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], tensors[name].to(device))
    rotary = type(empty.rotary_emb)(config=config).to(device)

    def run(hidden: torch.Tensor, batch: ForwardBatch, kv: KVPool) -> torch.Tensor:
        token = _step.set(_Step(batch, kv, {}, set(), set()))
        try:
            angles = rotary(hidden[None], batch.positions[None])
            out = layer(hidden[None], attention_mask=None, position_ids=batch.positions[None], position_embeddings=angles)
        finally:
            _step.reset(token)
        return (out[0] if isinstance(out, tuple) else out)[0]

    return run


def _fuse_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Checkpoints hold experts one by one, transformers' modules as two tensors."""
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name or ".experts.gate_up" in name}
    singles = sorted({int(name.split(".experts.")[1].split(".")[0]) for name in tensors.keys() - fused.keys()})
    if singles:
        part = {name: [tensors[f"mlp.experts.{index}.{name}_proj.weight"] for index in singles] for name in ("gate", "up", "down")}
        pairs = zip(part["gate"], part["up"], strict=True)
        fused["mlp.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        fused["mlp.experts.down_proj"] = torch.stack(part["down"])
    return fused


def _prediction_heads(config: Any) -> tuple[str, ...]:
    """Tensor names of multi-token-prediction heads, which `engine.drafters.mtp` reads, begin with these."""
    count = getattr(config, "num_nextn_predict_layers", 0) or 0
    return tuple(f"model.layers.{config.num_hidden_layers + index}." for index in range(count))


def wrap_model(hf: Any, make_spec: Callable[..., ModelSpec]) -> FallbackModel:
    """Checks a float32 transformers model against its own forward, then moves it to the spec's type and device."""
    config = hf.config
    name = config.model_type
    refuse(config)
    hf.eval()
    _register(_INTERFACE, _paged_attention)
    try:
        kv_heads, head_dim = _kv_shape(hf)
        spec = make_spec(num_kv_heads=kv_heads, head_dim=head_dim, parameters=sum(p.numel() for p in hf.parameters()))
        _probe(hf, spec)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ValueError(f"{name} cannot run on paged attention: {error}") from error
    hf.to(device=spec.device, dtype=spec.dtype)
    return FallbackModel(spec, hf)


def _kv_shape(hf: Any) -> tuple[int, int]:
    """Key heads and head dimension, as the attention function receives them."""
    seen: set[tuple[int, int]] = set()

    def observe(_module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        if key.shape != value.shape:
            raise ValueError(f"its keys {tuple(key.shape)} and values {tuple(value.shape)} differ in shape")
        seen.add((key.shape[1], key.shape[3]))
        return torch.zeros_like(query).transpose(1, 2), None

    _register(_OBSERVER, observe)
    hf.set_attn_implementation(_OBSERVER)
    with torch.inference_mode():
        hf(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    if not seen:
        raise ValueError("it does not attend through transformers' attention interface")
    if len(seen) > 1:
        raise ValueError(f"its layers have different key shapes (heads, head_dim): {sorted(seen)}")
    return seen.pop()


def _probe(hf: Any, spec: ModelSpec) -> None:
    """A short text in one plain forward and in two paged steps. Raises ValueError where they disagree."""
    cpu = torch.device("cpu")
    tokens = torch.arange(1, _PROBE_TOKENS + 1) * 7 % spec.vocab_size
    hf.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = hf(input_ids=tokens[None], use_cache=False).logits[0].float()
    hf.set_attn_implementation(_INTERFACE)
    model = FallbackModel(replace(spec, dtype=torch.float32, device=cpu), hf)
    kv = KVPool(spec.num_layers, 4, 8, spec.num_kv_heads, spec.head_dim, torch.float32, cpu)
    logits = []
    for start, end in ((0, _PROBE_SPLIT), (_PROBE_SPLIT, _PROBE_TOKENS)):
        with torch.inference_mode():
            out, step = model.run(_one_sequence(tokens, start, end), kv)
        logits.append(out.logits[0].float())
    if missing := set(range(spec.num_layers)) - step.layers_seen:
        raise ValueError(f"layers {sorted(missing)} do not attend through transformers' attention interface")
    if _is_windowed(hf.config) and not step.windows_seen:
        raise ValueError("it has a sliding window that it does not pass to its attention")
    found = torch.cat(logits)
    if found.shape != expected.shape:
        raise ValueError(f"it returned logits {tuple(found.shape)}, expected {tuple(expected.shape)}")
    gap = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not gap <= _PROBE_TOLERANCE:
        raise ValueError(f"it gives other logits there than in transformers (relative difference {gap:.1e})")


def _is_windowed(config: Any) -> bool:
    layer_types = getattr(config, "layer_types", None)
    return "sliding_attention" in layer_types if layer_types else getattr(config, "sliding_window", None) is not None


def _one_sequence(tokens: torch.Tensor, start: int, end: int) -> ForwardBatch:
    positions = torch.arange(start, end)
    return ForwardBatch(
        token_ids=tokens[start:end],
        positions=positions,
        slots=positions + 8,  # blocks 1 and 2 of 8 tokens each
        block_tables=torch.tensor([[1, 2]], dtype=torch.int32),
        query_start=torch.tensor([0, end - start], dtype=torch.int32),
        kv_lengths=torch.tensor([end], dtype=torch.int32),
        logit_rows=torch.arange(end - start),
        max_query=end - start,
        max_kv=end,
    )
