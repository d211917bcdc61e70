"""Rebuilds the fast tokenizer that a GGUF file describes.

Byte-level BPE is rebuilt here, because the pre-tokenizer is only *named* in the file and must be known exactly (SmolLM's splits
digits, which a generic reading loses). SentencePiece vocabularies (Gemma, Llama 2) go through transformers' own converter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

    from engine.checkpoints.gguf_file import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4

_QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_PATTERNS = {
    "qwen2": _QWEN2_SPLIT,
    "llama-bpe": _LLAMA3_SPLIT,
    "smaug-bpe": _LLAMA3_SPLIT,  # SmolLM3
    "dbrx": _LLAMA3_SPLIT,  # Phi-4, OLMo-2
    "gpt-4o": _O200K_SPLIT,  # Phi-4-mini
}
_GPT2_KINDS = ("gpt-2", "olmo")
_GPT2_WITH_SINGLE_DIGITS = ("smollm", "refact")  # refact: Granite 3


def read_tokenizer(file: GGUFFile, path: Path) -> Any:
    """A transformers fast tokenizer with special tokens and chat template. Raises ValueError for kinds that are not known exactly."""
    model = file.need("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(file)
    elif model == "llama":
        tokenizer = _sentencepiece(path)
    else:
        raise ValueError(f"tokenizer model {model!r} is not supported, only gpt2 (byte-level BPE) and llama (SentencePiece)")
    return _wrap(tokenizer, file)


def _byte_level(file: GGUFFile) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    kind = file.get("tokenizer.ggml.pre", "default")
    tokens = file.need("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in file.need("tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab, merges, fuse_unk=False, ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(kind)
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for token, token_kind in zip(tokens, file.need("tokenizer.ggml.token_type"), strict=True):
        if token_kind in (_CONTROL, _USER_DEFINED):
            special = token_kind == _CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    if file.get("tokenizer.ggml.add_bos_token", kind == "llama-bpe"):
        bos = file.need("tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]}:1 $B:1", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _pre_tokenizer(kind: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if kind in _GPT2_WITH_SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if kind in _GPT2_KINDS:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind not in _PATTERNS:
        known = ", ".join([*_GPT2_WITH_SINGLE_DIGITS, *_GPT2_KINDS, *_PATTERNS])
        raise ValueError(f"pre-tokenizer {kind!r} of this GGUF file is not supported, only {known}")
    split = pre_tokenizers.Split(Regex(_PATTERNS[kind]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False).backend_tokenizer


def _wrap(tokenizer: Tokenizer, file: GGUFFile) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokens = file.need("tokenizer.ggml.tokens")
    special = {}
    for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")):
        index = file.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            special[name] = tokens[index]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=file.need(f"{file.architecture}.context_length"),
        **special,
    )
    if template := file.get("tokenizer.chat_template"):
        wrapped.chat_template = template
    return wrapped
