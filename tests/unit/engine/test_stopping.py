"""End of an answer, on a real byte-level tokenizer where characters span tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.sequence import Sequence
from engine.stopping import StopWatch
from engine.tokenizer import IncrementalDecoder, Tokenizer
from engine.types import FinishReason, Request, SamplingParams

END = 256


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<end>"])
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", chat_template=template))


def run(tokenizer: Tokenizer, tokens: list[int], step: int = 1, **fields) -> tuple[str, FinishReason | None, int]:
    sequence = Sequence(Request("x", (1,), SamplingParams(**({"max_tokens": 100} | fields))), 0, 1000)
    watch = StopWatch(sequence, tokenizer, (END,))
    for start in range(0, len(tokens), step):
        kept, reason = watch.scan(tokens[start : start + step], sequence.room)
        sequence.append(np.array(tokens[start : start + kept], np.int64))
        if reason is not None:
            return watch.text(sequence), reason, sequence.num_generated
    return watch.text(sequence), None, sequence.num_generated


@pytest.mark.parametrize("step", [1, 3, 50])
@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("hello world", (" w",), "hello"),
        ("a###b", ("###",), "a"),
        ("naïve - 日本語 text", ("日本語",), "naïve - "),
        ("both stop here", ("here", "stop"), "both "),
        ("xx\n\nyy", ("\n\n",), "xx"),
        ("aaab", ("aab",), "a"),
    ],
)
def test_stop_strings_span_tokens_and_are_left_out(tokenizer: Tokenizer, step: int, text: str, stop: tuple[str, ...], want: str) -> None:
    tokens = list(tokenizer.encode(text))
    got, reason, generated = run(tokenizer, tokens, step, stop=stop)
    assert (got, reason) == (want, FinishReason.STOP)
    first = min(text.find(s) + len(s) for s in stop if s in text)
    assert generated == len(text[:first].encode())  # up to and with the token that completed the stop string


def test_the_end_token_counts_and_does_not_show(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, [*tokenizer.encode("abc"), END, 5, 6], step=6) == ("abc", FinishReason.STOP, 4)


def test_ignored_end_tokens_go_on(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, [*tokenizer.encode("ab"), END, *tokenizer.encode("c")], max_tokens=4, ignore_eos=True) == (
        "abc",
        FinishReason.LENGTH,
        4,
    )


def test_stop_token_ids_stop(tokenizer: Tokenizer) -> None:
    a, b, c = tokenizer.encode("abc")
    assert run(tokenizer, [a, b, c], stop_token_ids=(b,)) == ("a", FinishReason.STOP, 2)


def test_length_cuts_inside_an_accepted_block(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, list(tokenizer.encode("abcdef")), step=6, max_tokens=4) == ("abcd", FinishReason.LENGTH, 4)


def test_an_end_token_at_the_limit_is_a_stop(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, [*tokenizer.encode("abc"), END], max_tokens=4)[1] is FinishReason.STOP


def test_unfinished_answers_have_no_reason(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, list(tokenizer.encode("abc")), stop=("zzz",)) == ("abc", None, 3)


@pytest.mark.parametrize("text", ["plain", "ünïcödé", "日本語テキスト", "emoji 👩‍👩‍👧 family", "mixed é日👍!"])
def test_incremental_text_is_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == decoder.text == text


def test_chats_are_rendered_up_to_the_answer(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages) == "[user]hi[assistant]"
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == "[user]hi[assistant]"


def test_a_model_without_chat_template_says_so() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=FastTokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(bare).render_chat([{"role": "user", "content": "hi"}])


def test_nothing_ends_an_answer_that_is_too_short(tokenizer: Tokenizer) -> None:
    text = list(tokenizer.encode("ab ab ab"))
    assert run(tokenizer, text, step=8, stop=("ab", "never here"), min_tokens=3) == ("ab ", FinishReason.STOP, 5)
