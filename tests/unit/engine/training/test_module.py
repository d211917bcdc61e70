"""The trainable module: the papers' equations, and the weights it begins with."""

from __future__ import annotations

import pytest
import torch

from engine.checkpoints import LoadedModel
from engine.checkpoints.drafters.formats import block_spec
from engine.training.module import BlockModule
from engine.training.run import Recipe, drafter_config
from engine.training.states import forward_states
from tests.unit.engine.drafters.plain import block_hidden


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_the_trainable_module_computes_the_papers_equations(loaded: LoadedModel, head: str) -> None:
    spec = block_spec(drafter_config(loaded, Recipe(layers=2, block_size=4, rank=8, head=head)))
    module = BlockModule(spec)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    texts = [tuple(range(1, 30)), tuple(range(40, 55))]
    taps = [taps.float() for taps, _ in forward_states(loaded.model, texts, spec.taps)]
    embedded = torch.randn(2, 3, 4, 32)
    anchors = torch.tensor([[4, 11, 28], [1, 9, 14]])
    hidden = module(torch.nn.utils.rnn.pad_sequence(taps, batch_first=True, padding_value=7.0), embedded, anchors)
    t = module.tensors()
    for text, rows in enumerate(anchors.tolist()):
        for row, anchor in enumerate(rows):
            plain = block_hidden(t, [taps[text][:anchor]], embedded[text, row], [None, None], (4, 2))
            assert hidden[text, row].detach().numpy() == pytest.approx(plain.numpy(), abs=2e-4)


def test_training_begins_as_the_target_ends(loaded: LoadedModel) -> None:
    from engine.checkpoints.tensors import read_tensors

    target = read_tensors(loaded.directory)
    module = BlockModule(block_spec(drafter_config(loaded, Recipe(layers=1, block_size=4, rank=8))))
    module.start_from(target)
    t = module.tensors()
    last = max(int(name.split(".")[2]) for name in target if name.startswith("model.layers."))
    assert torch.equal(t["norm.weight"], target["model.norm.weight"].float())
    assert torch.equal(t["layers.0.self_attn.v_proj.weight"], target[f"model.layers.{last}.self_attn.v_proj.weight"].float())
    assert (t["fc.weight"][:, -32:] - torch.eye(32)).abs().max() < 0.02
