"""Training end to end on a tiny model: splits, answers, states, losses, resuming, calibration, export, and the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from engine.checkpoints import LoadedModel, load_model
from engine.checkpoints.drafters import DrafterError, read_folder
from engine.checkpoints.drafters.formats import block_spec
from engine.drafters.parts.confidence import sigmoid
from engine.training.answers import read
from engine.training.calibrate import area, expected_error, fit, quality
from engine.training.export import export, pack
from engine.training.losses import Divergences, block_losses
from engine.training.module import BlockModule
from engine.training.prompts import Prompt, digest, part_of, read_prompts, split
from engine.training.provenance import leaks, read_provenance
from engine.training.run import Recipe, drafter_config, evaluate, plot_reliability, train
from engine.training.states import LiveStates, StateStore, forward_states
from engine.training.trainer import TrainConfig, Trainer, _walk
from service.cli.main import app
from tests.tiny_model import make_tiny_model
from tests.unit.engine.drafters.plain import block_hidden

PROMPTS = [Prompt(f"count to {number} and stop", ("math", "chat")[number % 2]) for number in range(30)]
RECIPE = Recipe(layers=1, block_size=4, rank=8, samples=1, max_tokens=16)
CONFIG = TrainConfig(steps=12, texts=2, anchors=8, checkpoint_every=4, learning_rate=5e-3)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("target") / "tiny")))


@pytest.fixture(scope="module")
def trained(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "spark"
    train(loaded, PROMPTS, out, recipe=RECIPE, config=CONFIG, tell=lambda _: None)
    return out


def test_a_hash_chosen_tenth_and_every_benchmark_prompt_stay_out_of_training_and_calibration() -> None:
    prompts = [Prompt(f"prompt number {number}") for number in range(2000)]
    benchmarks = [prompt.text.upper() + "  " for prompt in prompts[:40]]
    parts = split([*prompts, prompts[5]], benchmarks)
    used = {prompt.text for prompt in parts.train + parts.calibrate}
    assert not used & {prompt.text for prompt in prompts[:40]}
    assert not [text for text in used if part_of(text) == 0]
    assert len(parts.train) + len(parts.calibrate) + len(parts.judged) == 2000
    assert not {p.text for p in parts.train} & {p.text for p in parts.calibrate}
    assert 150 < len([prompt for prompt in prompts if part_of(prompt.text) == 0]) < 250
    assert part_of(" Prompt  NUMBER 7") == part_of("prompt number 7")


def test_prompts_come_from_lines_or_batch_jobs(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    body = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]}
    path.write_text(json.dumps({"prompt": "hi", "domain": "chat"}) + "\n" + json.dumps({"custom_id": "1", "body": body}) + "\n")
    assert read_prompts(path) == [Prompt("hi", "chat"), Prompt("hello", "other")]
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_prompts(path)


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


@pytest.mark.parametrize("likeness", [0.0, 0.99])
def test_losses_are_the_papers_once_drafts_are_accepted(likeness: float) -> None:
    """Before, the divergence weighs more, slot by slot."""
    torch.manual_seed(0)
    wanted, confidence = torch.randn(5, 3, 7) * 3.0, torch.randn(5, 3)
    logits = torch.lerp(torch.randn(5, 3, 7) * 3.0, wanted, likeness)
    valid = torch.rand(5, 3) > 0.3
    losses = block_losses(logits, confidence, wanted, valid, 4.0)
    apart = (wanted.softmax(-1) - logits.softmax(-1)).abs().sum(-1) / 2
    total = bce = weight = 0.0
    for slot in range(3):
        accepted = float((1 - apart[:, slot])[valid[:, slot]].mean())
        share = max(0.1, float(np.exp(-3.0 * accepted)))
        assert (share == 0.1) == (likeness > 0.5)
        for row in range(5):
            if valid[row, slot]:
                w = np.exp(-slot / 4.0)
                p, q = wanted[row, slot].softmax(-1), logits[row, slot].softmax(-1)
                a, c = float(apart[row, slot]), float(confidence[row, slot].sigmoid())
                total += w * (share * float((p * (p / q).log()).sum()) + (1 - share) * a)
                bce -= w * ((1 - a) * np.log(c) + a * np.log(1 - c))
                weight += w
    assert float(losses.total) == pytest.approx((total + bce) / weight, rel=1e-4)


def test_the_gradients_written_out_are_those_of_autograd() -> None:
    torch.manual_seed(1)
    wanted = torch.randn(6, 11)
    weights = torch.rand(2, 6)
    found = []
    for plain in (True, False):
        logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(2)).requires_grad_()
        if plain:
            kl = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted.softmax(-1), reduction="none").sum(-1)
            tv = 0.5 * (logits.softmax(-1) - wanted.softmax(-1)).abs().sum(-1)
        else:
            kl, tv = Divergences.apply(logits, wanted)
        (weights[0] * kl + weights[1] * tv).sum().backward()
        found.append((kl.detach(), tv.detach(), logits.grad))
    for plain_one, own in zip(*found, strict=True):
        torch.testing.assert_close(own, plain_one)


def test_a_drawn_part_of_the_vocabulary_stands_for_all_of_it(loaded: LoadedModel, trained: Path, tmp_path: Path) -> None:
    spec = block_spec(read_folder(trained).config)
    store = StateStore(trained / "training" / "states", 1 << 30)
    means = []
    for vocabulary in (0, 60):
        config = TrainConfig(steps=400, texts=2, anchors=8, learning_rate=0.0, vocabulary=vocabulary, full_from=1.0)
        (tmp_path / str(vocabulary)).mkdir()
        trainer = Trainer(spec, loaded.model.frozen(), store, tmp_path / str(vocabulary), config)
        trainer.train(lambda _: None)
        rows = [json.loads(line) for line in (tmp_path / str(vocabulary) / "log.jsonl").read_text().splitlines()]
        means.append((np.mean([row["kl"] for row in rows]), np.mean([row["tv"] for row in rows])))
    assert means[1][0] == pytest.approx(means[0][0], abs=0.1)
    assert means[1][1] == pytest.approx(means[0][1], abs=0.1)


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


def test_states_of_several_texts_in_one_forward_are_those_of_each(loaded: LoadedModel) -> None:
    texts = [tuple(range(1, 30)), tuple(range(5, 12)), tuple(range(2, 50))]
    together = forward_states(loaded.model, texts, (1, 2))
    for text, (taps, final) in zip(texts, together, strict=True):
        alone_taps, alone_final = forward_states(loaded.model, [text], (1, 2))[0]
        torch.testing.assert_close(taps, alone_taps, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(final, alone_final, rtol=2e-3, atol=2e-3)


def test_held_out_prompts_are_followed_and_data_is_shared_among_runs(loaded: LoadedModel, trained: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (trained / "training" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "held_length" in row] == [4, 8, 12]
    assert all(1.0 <= row["held_length"]["macro"] <= 5.0 for row in rows if "held_length" in row)
    said: list[str] = []
    before = sorted(path.stat().st_mtime_ns for path in (trained / "training" / "states").iterdir())
    plain = Recipe(layers=1, block_size=4, rank=0, samples=1, max_tokens=16)
    record = train(loaded, PROMPTS, tmp_path / "flash", recipe=plain, config=CONFIG, data=trained / "training", tell=said.append)
    assert not [line for line in said if line.startswith(("answers", "hidden states"))]
    assert sorted(path.stat().st_mtime_ns for path in (trained / "training" / "states").iterdir()) == before
    assert record["texts"] == read_folder(trained).record["texts"]
    # What stays out by another choice of benchmarks must not come in by way of the stored answers.
    barred = split(PROMPTS).train[0].text
    with pytest.raises(DrafterError, match="not trained on"):
        train(
            loaded, PROMPTS, tmp_path / "b", recipe=plain, config=CONFIG, benchmarks=[barred], data=trained / "training",
            generate_missing=False, tell=said.append,
        )  # fmt: skip


def test_texts_of_all_domains_are_drawn_alike_however_many_each_has(loaded: LoadedModel, trained: Path, tmp_path: Path) -> None:
    spec = block_spec(read_folder(trained).config)
    store = StateStore(trained / "training" / "states", 1 << 30)
    names = store.names()
    rare = set(names[:2])
    trainer = Trainer(
        spec, loaded.model.frozen(), store, tmp_path, CONFIG, domain_of={name: "rare" if name in rare else "common" for name in names}
    )
    few = {tuple(store.load(name).tokens.tolist()) for name in rare}
    drawn = [tuple(states.tokens.tolist()) in few for step in range(200) for states in trainer._read(step)[0]]
    assert len(names) > 8
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.1)


def test_a_held_out_text_is_walked_as_the_engine_walks_it() -> None:
    # Steps at places 0, 3, 4 and 6: the run that place 1 would have had is never met.
    assert _walk([2, 9, 9, 0, 1, 9, 0]) == 7 / 4


def test_the_loss_falls_and_the_record_says_how(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "training" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert np.mean([row["loss"] for row in rows[-4:]]) < np.mean([row["loss"] for row in rows[:4]]) - 0.05
    record = read_folder(trained).record
    assert record["target"] == "tiny"
    assert record["prompts"]["trained"] + record["prompts"]["calibrated"] + record["prompts"]["kept"] == 30
    assert (trained / "training" / "loss.png").stat().st_size > 1000


def test_prompts_of_the_models_own_begin_as_those_that_train_and_keep_to_the_rule(loaded: LoadedModel, tmp_path: Path) -> None:
    prompts = [Prompt(f"tell me all that you know about the number {number} and its neighbours", "chat") for number in range(40)]
    recipe = replace(RECIPE, own_prompts=30)
    train(loaded, prompts, tmp_path / "a", recipe=recipe, config=replace(CONFIG, steps=2), tell=lambda _: None)
    own = read_prompts(tmp_path / "a" / "training" / "own_prompts.jsonl")
    known = split(prompts)
    assert 10 < len(own) <= 30
    assert len({prompt.text for prompt in own} - {prompt.text for prompt in prompts}) == len(own)
    assert all(part_of(prompt.text) > 1 and prompt.text.startswith("tell me") and prompt.domain == "chat" for prompt in own)
    record = read_folder(tmp_path / "a").record
    assert record["prompts"]["trained"] == len(known.train) + len(own)
    assert record["texts"] > len(known.train)  # not all: some of this model's prompts leave no room for an answer
    made = read_provenance(tmp_path / "a")
    assert leaks(made) == []
    assert len(set(made["trained"]) & {digest(prompt.text) for prompt in own}) == record["texts"] - len(known.train)


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_as_if_nothing_had_happened(loaded: LoadedModel, trained: Path, tmp_path: Path) -> None:
    spec = block_spec(read_folder(trained).config)
    store = StateStore(trained / "training" / "states", 1 << 30)
    whole = Trainer(spec, loaded.model.frozen(), store, tmp_path, CONFIG)
    whole.train(lambda _: None)
    work = tmp_path / "killed"
    work.mkdir()
    first = Trainer(spec, loaded.model.frozen(), store, work, CONFIG)
    losses, steps = first._one_step, 0

    def one_step(texts: object, generator: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 7:
            raise Killed
        return losses(texts, generator)

    first._one_step = one_step
    with pytest.raises(Killed):
        first.train(lambda _: None)
    second = Trainer(spec, loaded.model.frozen(), store, work, CONFIG)
    assert second.step == 4
    second.train(lambda _: None)
    assert [json.loads(line)["step"] for line in (work / "log.jsonl").read_text().splitlines()] == list(range(1, 13))
    for name, tensor in whole.module.tensors().items():
        assert torch.equal(tensor, second.module.tensors()[name]), name


def test_states_stop_at_their_bound_and_are_written_once(loaded: LoadedModel, tmp_path: Path) -> None:
    from engine.training.answers import Text

    texts = [Text(str(n), tuple(range(1, 40)), 5) for n in range(10)]
    size = StateStore(tmp_path / "all", 1 << 30)
    assert size.write(texts, loaded.model, (1, 2), lambda _: None)
    each = next((tmp_path / "all").glob("*.safetensors")).stat().st_size
    bounded = StateStore(tmp_path / "some", 3 * each)
    assert not bounded.write(texts, loaded.model, (1, 2), lambda _: None)
    assert len(bounded.names()) == 3
    assert not bounded.write(texts, loaded.model, (1, 2), lambda _: None)
    assert len(bounded.names()) == 3


def test_states_made_on_the_way_are_those_on_disk_and_texts_together_train_as_they_do_alone(
    loaded: LoadedModel, trained: Path, tmp_path: Path
) -> None:
    spec = block_spec(read_folder(trained).config)
    store = StateStore(trained / "training" / "states", 1 << 30)
    live = LiveStates(read(trained / "training" / "answers.jsonl"), loaded.model, spec.taps, CONFIG.max_length)
    assert live.names() == store.names()
    for kept, made in zip(store.load_all(store.names()), live.load_all(live.names()), strict=True):
        assert torch.equal(kept.tokens, made.tokens)
        assert kept.prompt_length == made.prompt_length
        torch.testing.assert_close(made.taps, kept.taps, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(made.final, kept.final, atol=2e-3, rtol=2e-3)
    found = []
    for together in (1, 4):
        config = replace(CONFIG, texts=4, steps=1, anchors=200)
        (tmp_path / str(together)).mkdir()
        trainer = Trainer(spec, loaded.model.frozen(), store, tmp_path / str(together), config, workers=1)
        trainer._together = together
        texts = store.load_all(store.names()[:4])
        jobs = [(states, torch.arange(trainer._room(states) - 3 * index)) for index, states in enumerate(texts)]
        blocks = [trainer._forward(jobs[first : first + together], None) for first in range(0, 4, together)]
        kept = [block.valid for block in blocks]
        found.append(
            [
                torch.cat([getattr(block, name)[valid] for block, valid in zip(blocks, kept, strict=True)])
                for name in ("logits", "confidence", "wanted", "targets")
            ]
        )
    for alone, in_company in zip(*found, strict=True):
        torch.testing.assert_close(alone, in_company, atol=1e-3, rtol=1e-3)


def test_sequential_temperature_scaling_repairs_overconfidence() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0.8, 1.2, (6000, 4))
    stood = np.cumprod(rng.random((6000, 4)) < sigmoid(true), axis=1).astype(float)
    logits = true * np.array([3.0, 2.0, 1.0, 0.5]) + np.array([0.0, 0.9, 0.0, -0.4])
    evidence = np.stack([logits, rng.normal(0.0, 1.0, logits.shape)], -1)  # the sharpness says nothing here
    scales = fit(evidence[:3000], stood[:3000])
    assert scales[0, :2] == pytest.approx([3.0, 2.0], rel=0.25)
    assert scales[1, :2] == pytest.approx([0.0, 0.9], abs=0.25)
    assert scales[2, :2].max() <= 0.25
    before, after = quality(evidence[3000:], stood[3000:]), quality(evidence[3000:], stood[3000:], scales)
    assert after.ece.max() < 0.04 < before.ece.max()
    assert (after.brier < after.base_brier).all()
    assert (after.auc > 0.7).all()


@pytest.mark.parametrize("confident", [True, False])
def test_calibration_weighs_the_sharpness_by_what_it_tells(confident: bool) -> None:
    """A head that knows half of the truth, or one that is not there; the other half is in how sharp the draft is."""
    rng = np.random.default_rng(0)
    parts = rng.normal(0.3, 1.5, (8000, 3, 2))
    if not confident:
        parts[..., 0] = 0.0
    stood = np.cumprod(rng.random((8000, 3)) < sigmoid(parts @ np.array([1.0, 2.0]) - 0.5), axis=1).astype(float)
    scales = fit(parts[:4000], stood[:4000])
    if confident:
        assert scales[2, :2] == pytest.approx([2.0, 2.0], abs=0.5)
    with_it, without = (quality(parts[4000:], stood[4000:], one) for one in (scales, scales * np.array([[1.0], [1.0], [0.0]])))
    assert with_it.ece.max() < 0.04
    assert (with_it.auc > without.auc + 0.1).all()


def test_measures_of_calibration_by_hand() -> None:
    assert expected_error(np.full(30, 0.5), np.tile([0.0, 1.0], 15)) == pytest.approx(0.0, abs=0.51)
    assert expected_error(np.full(15, 0.9), np.zeros(15)) == pytest.approx(0.9)
    assert area(np.array([0.1, 0.4, 0.8]), np.array([0.0, 1.0, 1.0])) == 1.0
    assert area(np.array([0.5, 0.5]), np.array([0.0, 1.0])) == 0.5
    assert np.isnan(area(np.array([0.5]), np.array([1.0])))


def test_a_trained_drafter_is_judged_calibrated_packed_and_exported(loaded: LoadedModel, trained: Path, tmp_path: Path) -> None:
    found = evaluate(loaded, [str(trained), "ngram"], PROMPTS[:6], drafts=4, max_tokens=12)
    report = {name: one.row() for name, one in found.items()}
    assert set(report) == {"spark", "ngram"}
    assert {"math", "chat", "macro", "ece_before", "ece_after"} == set(report["spark"])
    assert report["spark"]["macro"] >= 1.0
    assert report["ngram"]["ece_before"] is None
    low, high = found["spark"].details()["intervals"]["macro"]
    assert low <= report["spark"]["macro"] <= high
    assert len(found["spark"].details()["calibration"]["auc"]) == 4
    plot_reliability(found, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").stat().st_size > 5000
    assert read_folder(trained).calibration["temperatures"]
    full = export(read_folder(trained), loaded.model.frozen(), tmp_path / "full")
    config = json.loads((full / "config.json").read_text())
    assert "shared_with_target" not in config
    assert config["architectures"] == ["Qwen3DSparkModel"]
    tensors = read_folder(full).tensors()
    assert tensors["embed_tokens.weight"].shape == tensors["lm_head.weight"].shape == (loaded.model.spec.vocab_size, 32)
    assert evaluate(loaded, [str(full)], PROMPTS[:6], drafts=4, max_tokens=12)["spark"].row()["macro"] == pytest.approx(
        report["spark"]["macro"], abs=0.2
    )
    model = make_tiny_model(tmp_path / "model")
    where = pack(read_folder(trained), model)
    assert where == model / "drafters" / "spark"
    with pytest.raises(DrafterError, match="exists already"):
        pack(read_folder(trained), model)
    from engine.config import EngineConfig
    from engine.engine import Engine

    assert Engine(load_model(str(model)), EngineConfig(kv_bytes=4 << 20)).drafters.members == ("suffix", "spark")


def test_commands(trained: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    runner = CliRunner()
    shown = json.loads(runner.invoke(app, ["drafter", "inspect", str(trained), "--json"]).stdout)
    assert (shown["layout"], shown["layers"], shown["record"]["steps"]) == ("deepspec", 1, 12)
    listed = json.loads(runner.invoke(app, ["drafter", "list", "--json"]).stdout)
    assert {"ngram", "suffix"} <= {row["name"] for row in listed}
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt.text, "domain": prompt.domain}) for prompt in PROMPTS[:4]))
    command = [
        "drafter",
        "eval",
        str(loaded.directory),
        "--prompts",
        str(path),
        "--drafter",
        "suffix",
        "--max-tokens",
        "8",
        "--each",
        "2",
        "--json",
    ]
    report = json.loads(runner.invoke(app, command).stdout)
    assert set(report["drafters"]["suffix"]) == {"math", "chat", "macro", "ece_before", "ece_after"}
    assert (report["temperature"], report["prompts"]) == (0.0, 4)
    failed = runner.invoke(app, ["drafter", "inspect", str(tmp_path)])
    assert failed.exit_code == 1
    assert "no config.json" in str(failed.exception)
