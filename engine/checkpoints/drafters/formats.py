"""Which layout a drafter's config.json describes, and what it says in our own terms. Keys decide, never a path."""

from __future__ import annotations

from typing import Any, cast

from engine.checkpoints.drafters.errors import DrafterError
from engine.checkpoints.drafters.keys import activation, choice, integer, integers
from engine.checkpoints.drafters.specs import BlockSpec, EagleSpec, LayerSpec, TargetNeeds

Config = dict[str, Any]
DEEPSPEC, DEEPSPEC_EAGLE, ZLAB, EAGLE = "deepspec", "deepspec-eagle3", "z-lab-dflash", "eagle3"
SPECULATORS = ("speculators-dflash", "speculators-dspark", "speculators-eagle3")
MODEL = "model"
_BLOCKS = (4, 16)
_HEADS = ("vanilla", "gated", "rnn")


def detect(config: Config) -> str:
    """The layout's name. Raises DrafterError with the keys that would tell."""
    if "speculators_model_type" in config:
        name = f"speculators-{config['speculators_model_type']}"
        if name not in SPECULATORS:
            known = ", ".join(known.removeprefix("speculators-") for known in SPECULATORS)
            raise DrafterError(f"speculators_model_type is {config['speculators_model_type']!r}; supported are {known}")
        return name
    if "markov_rank" in config and "target_layer_ids" in config:
        return DEEPSPEC
    if "ttt_length" in config and "target_layer_ids" in config:
        return DEEPSPEC_EAGLE
    if "dflash_config" in config:
        return ZLAB
    if "draft_vocab_size" in config:
        return EAGLE
    if "model_type" in config and "vocab_size" in config:
        return MODEL
    raise DrafterError(
        "its config.json describes no known drafter: there is no speculators_model_type, no target_layer_ids beside markov_rank or "
        "ttt_length, no dflash_config, no draft_vocab_size, and no model_type with vocab_size either"
    )


def block_spec(config: Config) -> BlockSpec:
    """DSpark and DFlash, by any of their layouts. Raises DrafterError naming the key that is wrong."""
    layout = detect(config)
    if layout == DEEPSPEC:
        return _deepspec(config)
    if layout == ZLAB:
        return _zlab(config)
    if layout in SPECULATORS[:2]:
        return _speculators_block(config, layout)
    raise DrafterError(f"a drafter of layout {layout} drafts no blocks")


def eagle_spec(config: Config, target_layers: int) -> EagleSpec:
    """EAGLE-3, by any of its layouts; `target_layers` decides the taps where the config does not."""
    layout = detect(config)
    if layout == DEEPSPEC_EAGLE:
        layers = layer_spec(config, qk_norm=True)
        return EagleSpec(
            format=layout,
            layers=layers,
            needs=_needs(config, num_layers=config.get("num_target_layers")),
            taps=_taps(config, "target_layer_ids", embeddings=False),
            target_hidden_size=layers.hidden_size,
            draft_vocab_size=integer(config, "vocab_size", least=1),
            all_fused=True,
            own_embedding=True,
        )
    if layout == SPECULATORS[2]:
        return _speculators_eagle(config, target_layers)
    if layout != EAGLE:
        raise DrafterError(f"a drafter of layout {layout} is no EAGLE-3 head")
    inner = config.get("eagle_config") or {}
    if not inner.get("use_aux_hidden_state", True):
        raise DrafterError("eagle_config.use_aux_hidden_state is false: a head without several target layers is EAGLE-1 or 2, not EAGLE-3")
    given = inner.get("eagle_aux_hidden_state_layer_ids") or config.get("eagle_aux_hidden_state_layer_ids")
    layers = layer_spec(config, qk_norm=config.get("model_type") == "qwen3")
    if layers.num_layers != 1:
        raise DrafterError(f"num_hidden_layers is {layers.num_layers}; the original EAGLE-3 layout has one layer")
    return EagleSpec(
        format=layout,
        layers=layers,
        needs=_needs(config, hidden_size=config.get("target_hidden_size", layers.hidden_size)),
        taps=tuple(given) if given else _default_taps(target_layers),
        target_hidden_size=int(config.get("target_hidden_size", layers.hidden_size)),
        draft_vocab_size=integer(config, "draft_vocab_size", least=1),
        prefix="midlayer",
    )


def layer_spec(config: Config, *, qk_norm: bool) -> LayerSpec:
    """Sizes as transformers names them."""
    hidden, heads = integer(config, "hidden_size", least=1), integer(config, "num_attention_heads", least=1)
    head_dim = config.get("head_dim") or hidden // heads
    return LayerSpec(
        hidden_size=hidden,
        num_layers=integer(config, "num_hidden_layers", least=1),
        num_heads=heads,
        num_kv_heads=integer(config, "num_key_value_heads", heads, least=1),
        head_dim=head_dim,
        intermediate_size=integer(config, "intermediate_size", least=1),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=activation(config),
        attention_bias=bool(config.get("attention_bias", False)),
        attention_scale=head_dim**-0.5,
        qk_norm=qk_norm,
        rope_type="qwen3" if config.get("model_type", "qwen3") == "qwen3" else "llama",
        rope=dict(config),
    )


def _deepspec(config: Config) -> BlockSpec:
    gemma = "Gemma4DSparkModel" in (config.get("architectures") or []) or config.get("model_type") == "gemma4_text"
    layers = _gemma_layers(config) if gemma else layer_spec(config, qk_norm=True)
    if "sliding_attention" in (config.get("layer_types") or []):
        raise DrafterError("layer_types names sliding_attention; DeepSpec's drafters attend to all of their context")
    return BlockSpec(
        format=DEEPSPEC,
        layers=layers,
        needs=_needs(config, num_layers=integer(config, "num_target_layers", least=1)),
        taps=_taps(config, "target_layer_ids", embeddings=True),
        block_size=_block_size(config),
        mask_token_id=integer(config, "mask_token_id"),
        predicts_next=True,
        windows=(None,) * layers.num_layers,
        draft_vocab_size=integer(config, "vocab_size", least=1),
        embedding_scale=layers.hidden_size**0.5 if gemma else 1.0,
        logit_soft_cap=config.get("final_logit_softcapping") if gemma else None,
        stored=frozenset({"embed_tokens.weight", "lm_head.weight"}) - frozenset(config.get("shared_with_target") or ()),
        **_heads(config),
    )


def _gemma_layers(config: Config) -> LayerSpec:
    same = bool(config.get("attention_k_eq_v"))
    head_dim = integer(config, "global_head_dim", least=1)
    base = layer_spec({**config, "hidden_act": config.get("hidden_activation", "gelu_pytorch_tanh"), "head_dim": head_dim}, qk_norm=True)
    return LayerSpec(
        hidden_size=base.hidden_size,
        num_layers=base.num_layers,
        num_heads=base.num_heads,
        num_kv_heads=integer(config, "num_global_key_value_heads", least=1) if same else base.num_kv_heads,
        head_dim=head_dim,
        intermediate_size=base.intermediate_size,
        norm_eps=base.norm_eps,
        activation=base.activation,
        attention_bias=base.attention_bias,
        attention_scale=1.0,
        qk_norm=True,
        rope_type="gemma4_text",
        rope=dict(config),
        sandwich=True,
        keys_are_values=same,
    )


def _zlab(config: Config) -> BlockSpec:
    inner = {**config, **config["dflash_config"]}
    layers = layer_spec(config, qk_norm=True)
    causal = config.get("is_causal")
    return BlockSpec(
        format=ZLAB,
        layers=layers,
        needs=_needs(config, num_layers=config.get("num_target_layers")),
        taps=_taps(inner, "target_layer_ids", embeddings=False),
        block_size=_block_size(inner),
        mask_token_id=integer(inner, "mask_token_id"),
        predicts_next=False,
        windows=_windows(config, layers.num_layers),
        causal_windows=True if causal is None else bool(causal),
        draft_vocab_size=integer(config, "vocab_size", least=1),
        embedding_scale=float(inner.get("input_embedding_scale", 1.0)),
        logit_soft_cap=inner.get("final_logit_softcapping"),
    )


def _speculators_block(config: Config, layout: str) -> BlockSpec:
    inner = config.get("transformer_layer_config")
    if not isinstance(inner, dict):
        raise DrafterError("config.json has no transformer_layer_config")
    layers = layer_spec(inner, qk_norm=True)
    spark = layout == "speculators-dspark"
    reduced = integer(config, "draft_vocab_size", least=1)
    return BlockSpec(
        format=layout,
        layers=layers,
        needs=_needs(inner, name=_verifier(config), hidden_size=config.get("target_hidden_size") or layers.hidden_size),
        taps=integers(config, "aux_hidden_state_layer_ids"),
        block_size=_block_size(config),
        mask_token_id=integer(config, "mask_token_id"),
        predicts_next=bool(spark if config.get("sample_from_anchor") is None else config["sample_from_anchor"]),
        windows=_windows(inner, layers.num_layers),
        causal_windows=not config.get("sliding_window_non_causal", False),
        draft_vocab_size=reduced,
        stored=frozenset({"lm_head.weight", "d2t"}) if reduced != integer(inner, "vocab_size", least=1) else frozenset(),
        **(_heads(config) if spark else {}),
    )


def _speculators_eagle(config: Config, target_layers: int) -> EagleSpec:
    inner = config.get("transformer_layer_config")
    if not isinstance(inner, dict):
        raise DrafterError("config.json has no transformer_layer_config")
    layers = layer_spec(inner, qk_norm=inner.get("model_type") == "qwen3")
    given = config.get("eagle_aux_hidden_state_layer_ids") or config.get("aux_hidden_state_layer_ids")
    target_hidden = int(config.get("target_hidden_size") or layers.hidden_size)
    return EagleSpec(
        format="speculators-eagle3",
        layers=layers,
        needs=_needs(inner, name=_verifier(config), hidden_size=target_hidden),
        taps=tuple(given) if given else _default_taps(target_layers),
        target_hidden_size=target_hidden,
        draft_vocab_size=integer(config, "draft_vocab_size", least=1),
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        norm_before_fc=bool(config.get("norm_before_fc", False)),
    )


def _heads(config: Config) -> Any:
    rank = integer(config, "markov_rank", 0)
    confidence = bool(config.get("enable_confidence_head", False))
    with_markov = confidence and bool(config.get("confidence_head_with_markov", False))
    if with_markov and rank == 0:
        raise DrafterError("confidence_head_with_markov is set, but markov_rank is 0: there is no token embedding for it to read")
    kind = choice(config, "markov_head_type", _HEADS, "vanilla")
    return {"markov_rank": rank, "markov_type": kind, "confidence": confidence, "confidence_with_markov": with_markov}


def _block_size(config: Config) -> int:
    size = integer(config, "block_size", least=2)
    if not _BLOCKS[0] <= size <= _BLOCKS[1]:
        raise DrafterError(
            f"block_size is {size}; blocks of {_BLOCKS[0]} to {_BLOCKS[1]} are supported, and longer drafts come by chaining"
        )
    return size


def _windows(config: Config, count: int) -> tuple[int | None, ...]:
    types = config.get("layer_types") or ["full_attention"] * count
    if len(types) != count:
        raise DrafterError(f"layer_types has {len(types)} entries for {count} layers")
    return tuple(integer(config, "sliding_window", least=1) if kind == "sliding_attention" else None for kind in types)


def _taps(config: Config, key: str, *, embeddings: bool) -> tuple[int, ...]:
    ids = integers(config, key)
    if min(ids) < (-1 if embeddings else 0) or list(ids) != sorted(set(ids)):
        raise DrafterError(f"{key} must be rising layer numbers{', or -1 for the embeddings,' if embeddings else ''} got {list(ids)}")
    return tuple(layer + 1 for layer in ids)


def _default_taps(layers: int) -> tuple[int, ...]:
    """EAGLE-3's own choice: a low, a middle and a high layer's input."""
    return (2, layers // 2, layers - 3)


def _verifier(config: Config) -> str | None:
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    return cast("str | None", verifier.get("name_or_path"))


def _needs(config: Config, **known: Any) -> TargetNeeds:
    hidden = known.pop("hidden_size", None) or integer(config, "hidden_size", least=1)
    return TargetNeeds(hidden_size=int(hidden), vocab_size=integer(config, "vocab_size", least=1), **known)
