"""Independent draft models of the same and of another vocabulary, and the MTP head inside a checkpoint, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.batch import TargetModel
from engine.checkpoints import load_model
from engine.checkpoints.drafters import DrafterError
from engine.checkpoints.drafters.mtp import mtp_heads
from engine.config import EngineConfig
from engine.drafters.base import DraftBatch
from engine.drafters.draft_model import DraftModelDrafter
from engine.drafters.mtp import MtpDrafter
from engine.drafters.parts.chain import pieces
from engine.drafters.parts.tokenizers import Translation, continuation
from engine.engine import Engine
from engine.types import Request, SamplingParams
from tests.tiny_model import make_tiny_model
from tests.unit.engine.drafters.layouts import Scene, write
from tests.unit.engine.models.tiny import make_hf, make_lean


@pytest.fixture(scope="module")
def hf() -> Any:
    return make_hf("qwen3")


@pytest.fixture(scope="module")
def target(hf: Any) -> TargetModel:
    return make_lean(hf)


def greedy(hf: Any, tokens: list[int], count: int) -> list[int]:
    prompt = torch.tensor([tokens])
    out = hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(tokens) :].tolist()


def test_a_draft_model_goes_on_as_it_would_alone_whatever_was_rejected(target: TargetModel) -> None:
    small = make_hf("llama", num_hidden_layers=2)
    scene = Scene(target)
    drafter = DraftModelDrafter("small", make_lean(small), scene.host)
    for step, cut in enumerate(([12, 5, 9], [13, 7, 12], [23, 9, 14])):
        for sequence, length, tokens in zip(scene.sequences, cut, scene.texts.tokens, strict=True):
            sequence.num_tokens = length
            sequence._buffer[:length] = tokens[:length].numpy()
        drafts = drafter.propose(DraftBatch(scene.sequences, np.array([4, 4, 2]), step))
        for row, (length, tokens) in enumerate(zip(cut, scene.texts.tokens, strict=True)):
            assert drafts.token_ids[row, : drafts.lengths[row]].tolist() == greedy(small, tokens[:length].tolist(), 4)[: (4, 4, 2)[row]]
    for sequence in scene.sequences:
        drafter.finish(sequence, complete=True)
    assert drafter._reader.cache._pool.num_held == 0


def test_long_texts_are_read_in_pieces() -> None:
    passes = pieces(np.array([0, 10, 0]), np.array([5000, 1, 3]))
    assert [sizes.tolist() for _, _, sizes in passes] == [[2048], [2048], [904, 1, 3]]
    assert [first.tolist() for _, first, _ in passes] == [[0], [2048], [4096, 10, 0]]
    assert [rows.tolist() for rows, _, _ in passes] == [[0], [0], [0, 1, 2]]


class Words:
    """A tokenizer of the given pieces, longest first, over ASCII."""

    def __init__(self, *pieces: str) -> None:
        self._pieces = [*pieces, *map(chr, range(32, 127))]

    def encode(self, text: str, **_: Any) -> list[int]:
        tokens = []
        while text:
            piece = max((piece for piece in self._pieces if text.startswith(piece)), key=len)
            tokens.append(self._pieces.index(piece))
            text = text[len(piece) :]
        return tokens

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(self._pieces[token] for token in tokens)


def test_text_translates_between_tokenizers_as_it_grows() -> None:
    one, other = Words("hello", " wor", "ld"), Words("he", "llo w", "or")
    translation = Translation(one, other)
    text = "hello world, hello world. " * 12
    tokens = one.encode(text)
    for end in range(1, len(tokens) + 1):
        got = translation.of(tokens[:end])
        assert other.decode(got) == one.decode(tokens[:end])
    assert len(got) < len(text)


def test_a_continuation_that_would_change_the_text_before_it_is_no_draft() -> None:
    words = Words("hello", "hel", " there")
    assert continuation(words, words.encode("say hello"), " there now") == words.encode(" there now")
    assert continuation(words, words.encode("say hel"), "lo") == words.encode("lo")[:2]
    assert words.decode(continuation(words, words.encode("hel"), "lo there")) == "lo there"


def test_another_tokenizer_drafts_exactly_in_the_engine(fixed_costs: None, tmp_path: Path) -> None:
    """The draft model is the target itself under renamed tokens, so nearly everything it says is right."""
    model = make_tiny_model(tmp_path / "target")
    other = make_tiny_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    order = sorted(vocab, key=vocab.get)
    tokenizer["model"]["vocab"] = {piece: 255 - number for number, piece in enumerate(order)}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    tensors = load_file(other / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat((embedding[:256].flip(0), embedding[256:])).contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})

    def answers(drafter: str) -> tuple[dict[str, tuple[int, ...]], Engine]:
        engine = Engine(
            load_model(str(model)), EngineConfig(kv_bytes=4 << 20, max_sequences=4, drafter=drafter, max_draft_tokens=4, seed=1)
        )
        params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
        prompts = ["Once upon a time", "two plus two is", "hello"]
        made = [Request(str(n), engine.tokenizer.encode(text), params) for n, text in enumerate(prompts)]
        return {result.id: result.token_ids for result in engine.run(iter(made))}, engine

    plain, _ = answers("off")
    drafted, engine = answers(str(other))
    assert drafted == plain
    assert engine.stats().verified > 0


def glm(folder: Path) -> tuple[Path, Any]:
    """A tiny GLM-4.5 with one MTP layer, in the layout of its checkpoints (experts one by one)."""
    made = make_hf(
        "glm4_moe",
        num_hidden_layers=2,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
        attention_bias=True,
        tie_word_embeddings=False,
        num_attention_heads=6,
    )
    made.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    head = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    head |= {f"model.layers.2.{name}.weight": torch.ones(48) for name in ("enorm", "hnorm", "shared_head.norm")}
    head["model.layers.2.eh_proj.weight"] = torch.randn(48, 96, generator=generator) * 0.2
    head = {name: tensor + torch.randn(tensor.shape, generator=generator) * 0.05 for name, tensor in head.items()}
    save_file(tensors | head, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, made


def test_glm_mtp_head_drafts_what_its_layer_says(tmp_path: Path) -> None:
    folder, hf = glm(tmp_path / "glm")
    from engine.checkpoints.drafters.mtp import NEXTN
    from engine.models.fallback import wrap_model
    from tests.unit.engine.models.tiny import make_spec

    heads = mtp_heads(folder)
    assert heads is not None
    assert (heads.layout, heads.count, heads.prefix) == (NEXTN, 1, "model.layers.2.")
    model = wrap_model(hf, lambda **shape: make_spec(hf.config, **shape))
    scene = Scene(model)
    drafter = MtpDrafter.load(heads, scene.host)
    scene.feed(drafter, [[(0, 0, 22)], [(1, 0, 3), (2, 0, 13)], [(1, 3, 8)]])
    drafts = drafter.propose(DraftBatch(scene.sequences, np.array([3, 3, 3]), 1))
    late = Scene(model)
    drafter = MtpDrafter.load(heads, late.host)
    late.feed(drafter, [[(0, 0, 6)]])
    late.feed(drafter, [[(0, 6, 15)]], seen=False)  # what it missed while it rested does not exist for it
    late.feed(drafter, [[(0, 15, 22)]])
    rested = drafter.propose(DraftBatch(late.sequences[:1], np.array([3]), 1))
    t = heads.tensors()
    layer = hf.model.layers[1]
    fresh = type(layer)(hf.config, 1)
    from engine.models.fallback import _fuse_experts

    fresh.load_state_dict(
        _fuse_experts({name: tensor for name, tensor in t.items() if not name.startswith(("enorm", "hnorm", "eh_", "shared"))})
    )
    fresh.eval()
    for row, tokens in enumerate(scene.texts.tokens):
        assert drafts.token_ids[row].tolist() == plain_mtp(hf, fresh, t, tokens, 3)
    seen = [*range(6), *range(15, 22)]
    assert rested.token_ids[0].tolist() == plain_mtp(hf, fresh, t, late.texts.tokens[0], 3, seen)


def plain_mtp(
    hf: Any, layer: Any, t: dict[str, torch.Tensor], tokens: torch.Tensor, count: int, seen: list[int] | None = None
) -> list[int]:
    """The DeepSeek-V3 report's equations 21 to 23, each pass over the whole text, or over the positions that were `seen` of it."""
    from tests.unit.engine.drafters.plain import rms

    hf.set_attn_implementation("eager")
    eps = hf.config.rms_norm_eps
    with torch.inference_mode():
        rows = list(hf(input_ids=tokens[None], output_hidden_states=True).hidden_states[-1][0, :-1])
        places = list(range(len(rows))) if seen is None else list(seen)
        rows, given, drafts = [rows[place] for place in places], [int(tokens[place + 1]) for place in places], []
        while len(drafts) < count:
            embedded = hf.model.embed_tokens.weight[torch.tensor(given)]
            joined = torch.cat((rms(embedded, t["enorm.weight"], eps), rms(torch.stack(rows), t["hnorm.weight"], eps)), -1)
            x = (joined @ t["eh_proj.weight"].T)[None]
            place = torch.tensor(places)[None]
            mask = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None]
            layer.self_attn.config._attn_implementation = "eager"
            out = layer(x, attention_mask=mask, position_ids=place, position_embeddings=hf.model.rotary_emb(x, place))[0]
            drafts.append(int((rms(out[-1], t["shared_head.norm.weight"], eps) @ hf.lm_head.weight.T).argmax()))
            rows.append(out[-1])
            given.append(drafts[-1])
            places.append(places[-1] + 1)
    return drafts


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            {"model_type": "qwen3_next", "mtp_num_hidden_layers": 1, "hidden_size": 4},
            {
                "mtp.fc.weight": (4, 8),
                "mtp.norm.weight": (4,),
                "mtp.pre_fc_norm_embedding.weight": (4,),
                "mtp.pre_fc_norm_hidden.weight": (4,),
            },
            "qwen3_next has 1 MTP heads of layout qwen-mtp.*linear-attention",
        ),
        (
            {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1, "num_hidden_layers": 3, "hidden_size": 4, "kv_lora_rank": 8},
            {
                "model.layers.3.enorm.weight": (4,),
                "model.layers.3.hnorm.weight": (4,),
                "model.layers.3.eh_proj.weight": (4, 8),
                "model.layers.3.shared_head.norm.weight": (4,),
            },
            "deepseek_v3 has 1 MTP heads.*latent attention",
        ),
        (
            {"model_type": "deepseek_v4", "dspark_block_size": 8, "dspark_markov_rank": 4, "num_nextn_predict_layers": 3, "hidden_size": 4},
            {"mtp.0.x": (1,)},
            "deepseek_v4 has 3 MTP heads of layout deepseek-v4-dspark",
        ),
    ],
)
def test_heads_of_hybrid_and_latent_attention_targets_load_and_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    folder = write(tmp_path / "m", config, {name: torch.zeros(shape) for name, shape in tensors.items()})
    heads = mtp_heads(folder)
    assert heads is not None
    assert len(heads.tensors()) == len(tensors)
    with pytest.raises(DrafterError, match=message):
        heads.refuse_unless_runnable()


def test_missing_mtp_tensors_are_named(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "m",
        {"model_type": "glm4_moe", "num_nextn_predict_layers": 1, "num_hidden_layers": 3, "hidden_size": 4},
        {"model.layers.3.enorm.weight": torch.zeros(4)},
    )
    heads = mtp_heads(folder)
    assert heads is not None
    with pytest.raises(DrafterError, match=r"lacks eh_proj.weight, hnorm.weight, shared_head.norm.weight"):
        heads.tensors()
