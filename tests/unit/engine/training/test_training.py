"""Training end to end on a tiny model: steps, resuming, held-out prompts, export, and the commands."""

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
from engine.profile import Profiles
from engine.training.answers import read
from engine.training.export import export, pack
from engine.training.judge import evaluate, plot_reliability
from engine.training.prompts import Prompt, digest, part_of, read_prompts, split
from engine.training.provenance import leaks, read_provenance
from engine.training.report import Report
from engine.training.run import Recipe, train
from engine.training.states import LiveStates, StateStore
from engine.training.trainer import TrainConfig, Trainer, _walk
from service.cli.main import app
from tests.tiny_model import make_tiny_model

PROMPTS = [Prompt(f"count to {number} and stop", ("math", "chat")[number % 2]) for number in range(30)]
RECIPE = Recipe(layers=1, block_size=4, rank=8, samples=1, max_tokens=16)
CONFIG = TrainConfig(steps=12, texts=2, anchors=8, checkpoint_every=4, learning_rate=5e-3)


@pytest.fixture(scope="module")
def trained(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "spark"
    train(loaded, PROMPTS, out, recipe=RECIPE, config=CONFIG)
    return out


def test_the_loss_falls_and_the_record_says_how(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "training" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert np.mean([row["loss"] for row in rows[-4:]]) < np.mean([row["loss"] for row in rows[:4]]) - 0.05
    record = read_folder(trained).record
    assert record["target"] == "tiny"
    assert record["prompts"]["trained"] + record["prompts"]["calibrated"] + record["prompts"]["kept"] == 30
    assert (trained / "training" / "loss.png").stat().st_size > 1000


def test_held_out_prompts_are_followed_and_data_is_shared_among_runs(loaded: LoadedModel, trained: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (trained / "training" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "held_length" in row] == [4, 8, 12]
    assert all(1.0 <= row["held_length"]["macro"] <= 5.0 for row in rows if "held_length" in row)
    counted: set[str] = set()
    report = Report(tick=lambda what, _done, _of: counted.add(what))
    before = sorted(path.stat().st_mtime_ns for path in (trained / "training" / "states").iterdir())
    plain = Recipe(layers=1, block_size=4, rank=0, samples=1, max_tokens=16)
    record = train(loaded, PROMPTS, tmp_path / "flash", recipe=plain, config=CONFIG, data=trained / "training", report=report)
    assert {"steps", "calibration at temperature 0"} < counted
    assert not {"answers.jsonl", "held.jsonl", "hidden states"} & counted, "they were made again"
    assert sorted(path.stat().st_mtime_ns for path in (trained / "training" / "states").iterdir()) == before
    assert record["texts"] == read_folder(trained).record["texts"]
    # What stays out by another choice of benchmarks must not come in by way of the stored answers.
    barred = split(PROMPTS).train[0].text
    with pytest.raises(DrafterError, match="not trained on"):
        train(
            loaded, PROMPTS, tmp_path / "b", recipe=plain, config=CONFIG, benchmarks=[barred], data=trained / "training",
            generate_missing=False,
        )  # fmt: skip


def test_a_held_out_text_is_walked_as_the_engine_walks_it() -> None:
    # Steps at places 0, 3, 4 and 6: the run that place 1 would have had is never met.
    assert _walk([2, 9, 9, 0, 1, 9, 0]) == 7 / 4


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


def test_a_drawn_part_of_the_vocabulary_stands_for_all_of_it(loaded: LoadedModel, trained: Path, tmp_path: Path) -> None:
    spec = block_spec(read_folder(trained).config)
    store = StateStore(trained / "training" / "states", 1 << 30)
    means = []
    for vocabulary in (0, 60):
        config = TrainConfig(steps=400, texts=2, anchors=8, learning_rate=0.0, vocabulary=vocabulary, full_from=1.0)
        (tmp_path / str(vocabulary)).mkdir()
        trainer = Trainer(spec, loaded.model.frozen(), store, tmp_path / str(vocabulary), config)
        trainer.train()
        rows = [json.loads(line) for line in (tmp_path / str(vocabulary) / "log.jsonl").read_text().splitlines()]
        means.append((np.mean([row["kl"] for row in rows]), np.mean([row["tv"] for row in rows])))
    assert means[1][0] == pytest.approx(means[0][0], abs=0.1)
    assert means[1][1] == pytest.approx(means[0][1], abs=0.1)


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


def test_prompts_of_the_models_own_begin_as_those_that_train_and_keep_to_the_rule(loaded: LoadedModel, tmp_path: Path) -> None:
    prompts = [Prompt(f"tell me all that you know about the number {number} and its neighbours", "chat") for number in range(40)]
    recipe = replace(RECIPE, own_prompts=30)
    train(loaded, prompts, tmp_path / "a", recipe=recipe, config=replace(CONFIG, steps=2))
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
    whole.train()
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
        first.train()
    second = Trainer(spec, loaded.model.frozen(), store, work, CONFIG)
    assert second.step == 4
    second.train()
    assert [json.loads(line)["step"] for line in (work / "log.jsonl").read_text().splitlines()] == list(range(1, 13))
    for name, tensor in whole.module.tensors().items():
        assert torch.equal(tensor, second.module.tensors()[name]), name


def test_a_trained_drafter_is_judged_calibrated_packed_and_exported(loaded: LoadedModel, trained: Path, tmp_path: Path) -> None:
    kept, said = Profiles(tmp_path / "cache", keep_records=False), []
    found = evaluate(loaded, [str(trained), "ngram"], PROMPTS[:6], drafts=4, max_tokens=12, profiles=kept, report=Report(said.append))
    assert [line.partition(":")[0] for line in said] == ["spark", "ngram"]
    assert len(list((tmp_path / "cache" / "profiles").glob("*/steps.json"))) == 1, "the machine's step times are measured once"
    assert not (tmp_path / "cache" / "drafter-records").exists()
    report = {name: one.row() for name, one in found.items()}
    assert set(report) == {"spark", "ngram"}
    assert {"math", "chat", "macro", "ece_before", "ece_after"} == set(report["spark"])
    assert report["spark"]["macro"] >= 1.0
    assert report["ngram"]["ece_before"] is None
    low, high = found["spark"].details()["intervals"]["macro"]
    assert low <= report["spark"]["macro"] <= high
    assert len(found["spark"].details()["calibration"]["auc"]) == 4
    got = found["spark"].got
    assert got.foretold.shape == got.stood.shape
    assert (np.diff(got.foretold, axis=1) <= 0.0).all()
    assert len(np.unique(got.foretold[:, 0])) > 1  # it learns, and goes by what each block's confidence says
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
