"""The sequential head against its equations, written out one sequence and one number at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kernels
from kernels import native
from kernels.reference.linear import pack_linear
from kernels.reference.noise import exponential
from kernels.reference.sequential_head import Kind, SequentialHead, sequential_head

S, K, V, H, R = 5, 4, 37, 6, 3


def make(kind: Kind, *, ids: bool = False) -> SequentialHead:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    rows = {"gated": (R, H + R), "rnn": (3 * R, 2 * R + H)}.get(kind)
    return SequentialHead(
        kind,
        None if kind == "none" else normal(90, R),
        None if kind == "none" else normal(V, R),
        None if rows is None else normal(*rows),
        None if rows is None else normal(rows[0]),
        normal(H if kind == "none" else H + R),
        normal(1),
        torch.randperm(90)[:V] if ids else None,
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("kind", ["none", "vanilla", "gated", "rnn"])
def test_every_kind_follows_its_equation(kind: Kind, ids: bool) -> None:
    head = make(kind, ids=ids)
    logits, hidden = torch.randn(S, K, V, dtype=torch.float64), torch.randn(S, K, H, dtype=torch.float64)
    anchors, keys = torch.randint(0, V, (S,)), torch.randint(-(2**62), 2**62, (S, K))
    temperatures = torch.tensor([0.0, 0.7, 1.0, 1.5, 0.0])
    block = sequential_head(logits, hidden, anchors, head, temperatures=temperatures, keys=keys, keep_weights=True)
    assert block.log_weights is not None
    assert block.confidence is not None
    names = np.arange(V) if head.token_ids is None else head.token_ids.numpy()
    for s in range(S):
        x, state = int(anchors[s]), np.zeros(R)
        for k in range(K):
            h = hidden[s, k].numpy()
            row = logits[s, k].numpy()
            w, b = (None, None) if head.mix_weight is None else (head.mix_weight.numpy(), head.mix_bias.numpy())
            features = h
            if head.w1 is not None:
                e = head.w1[x].numpy()
                features = np.concatenate((h, e))
                if kind == "gated":
                    e = e * sigmoid(w @ np.concatenate((h, e)) + b)
                if kind == "rnn":
                    z = w @ np.concatenate((state, e, h)) + b
                    g, c, o = z[:R], z[R : 2 * R], z[2 * R :]
                    state = sigmoid(g) * state + (1 - sigmoid(g)) * np.tanh(c)
                    e = np.tanh(o)
                row = row + head.w2.numpy() @ e
            t = float(temperatures[s])
            noise = exponential(keys[s, k : k + 1], torch.from_numpy(names))[0].double().numpy()
            tempered = row / (t or 1.0)
            column = int(tempered.argmax()) if t == 0.0 else int((noise / np.exp(tempered - tempered.max())).argmin())
            x = int(names[column])
            assert int(block.tokens[s, k]) == x
            np.testing.assert_allclose(block.log_weights[s, k].numpy(), tempered, rtol=1e-6)
            assert float(block.lse[s, k]) == pytest.approx(np.log(np.exp(tempered).sum()), rel=1e-6)
            assert float(block.peak[s, k]) == pytest.approx(tempered.max() - np.log(np.exp(tempered).sum()), rel=1e-6)
            score = float(head.confidence_weight.numpy() @ features + float(head.confidence_bias))
            assert float(block.confidence[s, k]) == pytest.approx(float(sigmoid(np.array(score))), rel=1e-6)
    torch.testing.assert_close(block.probabilities().sum(-1), torch.ones(S, K, dtype=torch.float64))


def test_a_packed_w2_needs_no_other() -> None:
    torch.manual_seed(0)
    w1, w2 = torch.randn(V, R), torch.randn(V, R)
    logits, anchors = torch.randn(S, K, V), torch.randint(0, V, (S,))
    packed = SequentialHead("vanilla", w1, packed_w2=pack_linear(w2))
    assert packed.columns == V
    found, exact = (sequential_head(logits, None, anchors, head, keep_weights=True) for head in (packed, SequentialHead("vanilla", w1, w2)))
    assert torch.equal(found.tokens, exact.tokens)
    torch.testing.assert_close(found.log_weights, exact.log_weights)
    with pytest.raises(ValueError, match="w2 has 37 rows, the logits 36 columns"):
        sequential_head(logits[..., 1:], None, anchors, packed)
    with pytest.raises(ValueError, match="needs both w1 and w2"):
        SequentialHead("vanilla", packed_w2=pack_linear(w2))


def test_what_is_missing_is_said() -> None:
    logits = torch.zeros(1, 2, V)
    with pytest.raises(ValueError, match="'gated' head needs mix_weight"):
        SequentialHead("gated", torch.zeros(V, R), torch.zeros(V, R))
    with pytest.raises(ValueError, match="has 9 rows, got 3"):
        SequentialHead("rnn", torch.zeros(V, R), torch.zeros(V, R), torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="w2 has 5 rows, the logits 37 columns"):
        sequential_head(logits, None, torch.zeros(1, dtype=torch.int64), SequentialHead("vanilla", torch.zeros(9, R), torch.zeros(5, R)))
    with pytest.raises(ValueError, match="needs hidden states"):
        sequential_head(logits, None, torch.zeros(1, dtype=torch.int64), make("gated"))
    with pytest.raises(ValueError, match="temperatures and keys"):
        sequential_head(logits, None, torch.zeros(1, dtype=torch.int64), SequentialHead("none"), temperatures=torch.ones(1))


@pytest.mark.skipif(not native.available(), reason="needs llvmlite, a processor with AVX2, and torch on GNU OpenMP")
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 7, 13, 100])
def test_likeliest_drafts_in_one_pass_equal_the_reference(kind: Kind, int8: bool, count: int) -> None:
    compare_likeliest(kind, int8, count)


def compare_likeliest(kind: Kind, int8: bool, count: int) -> None:
    torch.manual_seed(count)
    vocab, rank, width, slots = 256, 24, 16, 4
    rows = {"gated": (rank, width + rank), "rnn": (3 * rank, 2 * rank + width)}.get(kind)
    mixing = (None, None) if rows is None else (torch.randn(*rows), torch.randn(rows[0]))
    confidence = torch.randn(width + rank), torch.randn(1)
    packed = pack_linear(torch.randn(vocab, rank), int8=int8)
    head = SequentialHead(kind, torch.randn(vocab, rank), None, *mixing, *confidence, token_ids=torch.randperm(vocab), packed_w2=packed)
    logits, hidden, anchors = torch.randn(count, slots, vocab) * 9, torch.randn(count, slots, width), torch.randint(0, vocab, (count,))
    logits[0, 0] = -1e4  # far below all the others, and level but for the bias
    logits[0, 1] = 7.0
    wanted, found = sequential_head(logits, hidden, anchors, head), kernels.sequential_head(logits, hidden, anchors, head)
    assert torch.equal(found.tokens, wanted.tokens)
    for one, other in ((found.lse, wanted.lse), (found.peak, wanted.peak), (found.confidence, wanted.confidence)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert found.log_weights is None


@pytest.mark.skipif(not native.available(), reason="needs llvmlite, a processor with AVX2, and torch on GNU OpenMP")
def test_of_equal_tokens_the_first_is_drafted_and_of_no_numbers_any() -> None:
    head = SequentialHead("vanilla", torch.zeros(64, 8), None, packed_w2=pack_linear(torch.randn(64, 8)))
    logits = torch.zeros(3, 1, 64)
    logits[0, 0, [9, 40, 63]] = logits[1, 0, [31, 32]] = 1.0
    logits[2] = float("nan")
    tokens = kernels.sequential_head(logits, None, torch.zeros(3, dtype=torch.int64), head).tokens[:, 0].tolist()
    assert tokens[:2] == [9, 31]
    assert 0 <= tokens[2] < 64


def test_what_needs_weights_or_noise_is_left_to_the_reference() -> None:
    torch.manual_seed(0)
    head = SequentialHead("vanilla", torch.randn(64, 8), None, packed_w2=pack_linear(torch.randn(64, 8)))
    logits, anchors = torch.randn(3, 2, 64), torch.zeros(3, dtype=torch.int64)
    kept = kernels.sequential_head(logits, None, anchors, head, keep_weights=True)
    assert kept.log_weights is not None
    temperatures, keys = torch.tensor([0.0, 1.0, 0.5]), torch.randint(0, 1 << 40, (3, 2))
    block = kernels.sequential_head(logits, None, anchors, head, temperatures=temperatures, keys=keys)
    assert torch.equal(block.tokens, sequential_head(logits, None, anchors, head, temperatures=temperatures, keys=keys).tokens)
