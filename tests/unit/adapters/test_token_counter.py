"""Prompt tokens counted without a loaded model: as many as a worker makes of a line, and no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service.adapters.token_counter import LocalTokenizers
from service.config import ModelEntry
from service.domain.request_body import CHAT, COMPLETIONS, GenerationRequest, LineRejected, parse_body

TEMPLATE = (
    "<s>{% if messages[0].role != 'system' %}[you are helpful]{% endif %}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}{% if message.role == 'assistant' and loop.first %}{{ raise_exception('not yours to begin') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def save(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A tokenizer of one token a byte, which puts `<s>` before plain prompts."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate([*symbols, "<s>"])}, merges=[]))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", chat_template=template).save_pretrained(folder)
    return folder


def counter(folder: Path) -> Callable[[GenerationRequest], int]:
    found = LocalTokenizers({"m": ModelEntry(source=str(folder))}, folder).for_model("m")
    assert found is not None
    return found


def chat(*messages: tuple[str, str], **fields: Any) -> GenerationRequest:
    body = {"model": "m", "messages": [{"role": role, "content": content} for role, content in messages], **fields}
    return parse_body(CHAT, body)


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        (chat(("user", "héllo")), "[you are helpful]<user>héllo<assistant>"),
        (chat(("system", "be brief"), ("user", "hi")), "<system>be brief<user>hi<assistant>"),
        (chat(("user", "hi"), tools=[WEATHER], tool_choice="none"), "[you are helpful]<user>hi<assistant>"),
    ],
)
def test_a_conversation_counts_with_all_that_its_template_adds(asked: GenerationRequest, written: str, tmp_path: Path) -> None:
    assert counter(save(tmp_path))(asked) == 1 + len(written.encode()), "one token a byte, and the template's <s> once"


def test_tools_count_as_the_template_writes_them(tmp_path: Path) -> None:
    count = counter(save(tmp_path))
    asked = chat(("user", "hi"), tools=[WEATHER])
    rendered = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        asked.template_input, tools=asked.template_tools, tokenize=False, add_generation_prompt=True
    )
    assert "weather" in rendered
    assert count(asked) == len(rendered.removeprefix("<s>")) + 1


def test_plain_prompts_count_with_the_tokens_put_round_them(tmp_path: Path) -> None:
    count = counter(save(tmp_path))
    assert count(parse_body(COMPLETIONS, {"model": "m", "prompt": ["four", "and six"]})) == 1 + 4 + 1 + 7
    assert count(parse_body(COMPLETIONS, {"model": "m", "prompt": [5, 6, 7]})) == 3, "token ids are taken as they are"


def test_a_refusal_is_the_workers(tmp_path: Path) -> None:
    with pytest.raises(LineRejected, match="not yours to begin"):
        counter(save(tmp_path / "chats"))(chat(("assistant", "I")))
    with pytest.raises(LineRejected, match="no chat template"):
        counter(save(tmp_path / "plain", template=None))(chat(("user", "hi")))


def test_models_that_are_not_here_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    save(tmp_path / "models" / "packaged-1-v2")
    sources = {"broken": str(tmp_path / "broken"), "packaged": "packaged", "away": "somebody/something", "empty": str(tmp_path)}
    tokenizers = LocalTokenizers({name: ModelEntry(source=source) for name, source in sources.items()}, tmp_path)
    assert [name for name in [*sources, "unknown"] if tokenizers.for_model(name) is not None] == ["packaged"]


def test_counting_loads_no_torch(tmp_path: Path) -> None:
    """The API's process counts, and has no use for half a gigabyte of it."""
    program = (
        "import sys\n"
        "from service.adapters.token_counter import LocalTokenizers\n"
        "from service.config import ModelEntry\n"
        "from service.domain.request_body import CHAT, parse_body\n"
        "count = LocalTokenizers({'m': ModelEntry(source=sys.argv[1])}, None).for_model('m')\n"
        "print(count(parse_body(CHAT, {'model': 'm', 'messages': [{'role': 'user', 'content': 'hi'}]})), 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(save(tmp_path))], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(1 + len("[you are helpful]<user>hi<assistant>")), "False"]
