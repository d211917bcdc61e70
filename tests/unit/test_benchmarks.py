"""The benchmarks run end to end on a tiny model. What they measure here means nothing; that they measure and judge does."""

from __future__ import annotations

import json
import sys

import pytest

from tests.benchmarks import (
    cross_tokenizer,
    drafter_quality,
    drafters,
    json_schema,
    memory_budget,
    n_answers,
    offline_engines,
    replay_accuracy,
    shared_prompts,
    speculation_pays,
)
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(monkeypatch, capsys, model, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def go(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments), "--model", str(model), "--json"])
        status = module.main()
        result = json.loads(capsys.readouterr().out)
        assert status == int(not result["pass"])
        return result

    return go


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.jsonl"
    lines = [
        {"custom_id": str(n), "body": {"messages": [{"role": "user", "content": f"{n} bees, {n} bees"}], "max_tokens": 16}}
        for n in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_speculation_pays(run, job):
    result = run(speculation_pays, job, "--sizes", "1,4", "--repeats", 1, "--max-tokens", 24)
    assert [row["sequences"] for row in result["rows"]] == [1, 4]
    assert result["goal"] == pytest.approx(0.98 - result["aa_half_width"], abs=1e-3)
    assert result["virtual_worst_ratio"] > 0  # of a model this small, beside whatever else runs here, it means nothing
    assert result["model_error_median"] > 0


def test_shared_prompts(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_prompts, "_system", lambda number: f"desk {number}: " + "be brief. " * 8)
    monkeypatch.setattr(shared_prompts, "_question", lambda rng: f"where is {rng.randrange(1000)}?")
    result = run(shared_prompts, "--lines", 60, "--prompts", 3, "--no-sharing-lines", 20, "--write", tmp_path / "made.jsonl")
    assert result["lines"] > 50
    assert 0.5 < result["hit_rate"] <= result["hit_rate_of_a_perfect_cache"] + 1e-6
    assert result["part"]["answers_equal"][0] == result["part"]["answers_equal"][1]
    assert json.loads((tmp_path / "made.jsonl").read_text().splitlines()[0])["body"]["messages"][0]["role"] == "system"


def test_replay_accuracy(run, job):
    result = run(replay_accuracy, job, "--repeats", 1, "--max-sequences", 4)
    assert len(result["rows"]) == 4
    assert all(row["predicted"] > 0 for row in result["rows"])
    assert result["tied_live"] or set(result["ranked_right_from"]) == {"plain", "fixed-8"}


def test_memory_budget(run):
    """256 bytes of KV a token: 8 sequences of 128 tokens want 256 KiB and get 64."""
    result = run(memory_budget, "--budget-gib", 1 / (1 << 14), "--wants-gib", 1 / (1 << 12), "--sequences", 8, "--answer", 32)
    assert result["answered"] == [8, 8]
    assert result["kv_peak_bytes"] <= result["budget_bytes"] == 64 << 10
    assert result["pass"]


def test_json_schema(run):
    result = run(json_schema, "--lines", 12, "--repeats", 1, "--max-tokens", 200, "--max-sequences", 4)
    assert result["valid"][0] + result["cut_off"] == 12  # random weights like long numbers
    assert result["valid"][0] > 6
    assert result["texts_equal"]
    assert result["accepted_drafts"] > 12
    assert set(result["tokens_per_second"]) == {"plain", "drafts", "free plain", "free drafts"}
    assert not json_schema.valid_under(json_schema.SCHEMAS["enums"], '{"sentiment": "positive"}')
    assert not json_schema.valid_under(json_schema.SCHEMAS["enums"], "{")


def test_n_answers(run):
    """Prompts of six blocks and a part of one, answers of one block: one holds 8 blocks, four hold 6 + 4 * 2."""
    result = run(n_answers, "--n", 4, "--prompt-tokens", 100, "--answer", 16)
    one, several, apart = result["kv_peak_bytes"].values()
    assert result["prefilled_tokens"] == {"one answer": 100, "4 answers": 100 + 3 * 4, "4 lines": 400}
    assert several <= result["most_bytes"] < apart
    assert one < several
    assert result["distinct_answers"] == 4
    assert result["pass"]


def test_drafter_quality(run, model, tmp_path):
    """On a drafter that was hardly trained; run again, nothing is measured anew."""
    from engine.checkpoints import load_model
    from engine.training.prompts import Prompt, part_of
    from engine.training.run import Recipe, train
    from engine.training.trainer import TrainConfig

    loaded = load_model(str(model))
    texts = [f"count to {number}" for number in range(80)]
    prompts = [Prompt(text, ("math", "code")[number % 2]) for number, text in enumerate(texts)]
    for name, rank, steps in (("spark", 4, 2), ("flash", 0, 2), ("longer", 4, 3)):
        recipe, config = Recipe(layers=1, block_size=4, rank=rank, samples=1, max_tokens=12), TrainConfig(steps=steps, checkpoint_every=1)
        train(loaded, prompts, tmp_path / name, recipe=recipe, config=config, data=tmp_path)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt.text, "domain": prompt.domain}) + "\n" for prompt in prompts))
    drafters = [f"--drafter={tmp_path / name}" for name in ("spark", "flash", "longer")]
    options = ["--prompts", path, "--each", 3, "--max-tokens", 24, "--out", tmp_path / "out", *drafters]
    result = run(drafter_quality, *options)
    kept_out = sum(part_of(text) == 0 for text in texts)
    assert 2 <= sum(result["prompts"].values()) <= min(6, kept_out)
    assert set(result["temperatures"]) == {"0", "1"}
    rows = result["temperatures"]["1"]["drafters"]
    assert set(rows) == {"ngram", "suffix", "spark", "flash", "longer", "portfolio"}
    assert rows["spark"]["macro"] >= 1.0
    assert set(result["temperatures"]["0"]["over_dflash"]) == {"spark"}
    low, high = result["temperatures"]["0"]["over_dflash"]["spark"][1:]
    assert low <= result["temperatures"]["0"]["over_dflash"]["spark"][0] <= high
    assert len(rows["spark"]["details"]["calibration"]["auc"]) == 7
    assert any("macro" in problem for problem in result["missed"]) == (result["temperatures"]["0"]["drafters"]["spark"]["macro"] < 2)
    assert [len(rows) for rows in result["curves"].values()] == [2, 2, 3]
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert {"evaluation.json", "evaluation.md", "acceptance.png", "reliability-0.png", "reliability-1.png"} <= set(files)
    assert run(drafter_quality, *options) == result
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert {name for name in files if again[name] == files[name]} == {name for name in files if name.endswith(".npz")}


def test_cross_tokenizer(run, job, tmp_path, monkeypatch):
    """The drafter's tokens are numbered the other way round, so that nothing but text can pass between the two."""
    other = make_tiny_model(tmp_path / "other")
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {symbol: len(vocabulary) - 1 - number for symbol, number in vocabulary.items()}
    path.write_text(json.dumps(tokenizer))
    result = run(cross_tokenizer, job, "--drafter", other, "--lines", 6, "--max-tokens", 12, "--sequences", 2)
    assert result["answers_equal"] == [6, 6]
    assert result["accepted_drafts"][1] > 0
    assert result["interval"][0] <= result["acceptance_length"] <= result["interval"][1]


def test_drafters(run, job, model, tmp_path):
    """A trained drafter that knows nothing yet; run again, nothing is measured anew."""
    from engine.checkpoints import load_model
    from engine.training.export import write_folder
    from engine.training.module import BlockModule
    from engine.training.run import Recipe, block_spec, drafter_config

    config = drafter_config(load_model(str(model)), Recipe(layers=1, block_size=4, rank=4))
    folder = write_folder(tmp_path / "spark", config, BlockModule(block_spec(config)).tensors(), {})
    options = [job, "--drafter", folder, "--sizes", "1,2", "--repeats", 2, "--lines", 8, "--max-tokens", 16, "--out", tmp_path / "out"]
    result = run(drafters, *options, "--plot", tmp_path / "plot.png")
    assert [(row["job"], row["sequences"], row["drafter"]) for row in result["rows"]] == [
        (name, size, drafter)
        for size in (1, 2)
        for name in ("job", "templates")
        for drafter in ("none", "ngram", "suffix", "suffix cold", "trained", "auto")
    ]
    assert all(row["same_answers"] for row in result["rows"])
    assert {row["drafter"] for row in result["rows"] if "over_best_single" in row} == {"auto"}
    assert all(row["acceptance_length"] == 1.0 for row in result["rows"] if row["drafter"] == "none")
    assert [row["cap"] for row in result["caps"]] == [4, 8, 16, 32, 64]
    assert all(sum(row["chosen"].values()) > 0 for row in result["caps"])
    assert result["caps"][0]["chosen"]["8-15"] == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    runs = (tmp_path / "out" / "runs.jsonl").read_text()
    assert len(runs.splitlines()) == 2 * 2 * (6 * 2 + 1) + 5
    assert run(drafters, *options) == result
    assert (tmp_path / "out" / "runs.jsonl").read_text() == runs


def test_the_best_of_each_side_is_compared():
    def row(kind, name, speed, of_bound, stopped=False):
        same = {"peak_rss_bytes": 1, "identical_to_reference": [4, 4], "of_bound": of_bound, "stopped": stopped}
        return {"kind": kind, "name": name, "tokens_per_second": {"median": speed}, **same}

    runs = [
        row("longdraft", "a", 100.0, 0.5),
        row("longdraft", "b", 120.0, 0.92),
        row("vllm", "c", 90.0, 0.4),
        row("openvino", "d", 110.0, 0.8),
        row("transformers", "e", 500.0, 0.9, stopped=True),
    ]
    judged = offline_engines.judge("mixed", offline_engines.COMPARISONS["mixed"], {"runs": runs, "bound": {"tokens_per_second": 130.0}})
    assert (judged["ours"]["name"], judged["best_peer"]["name"], judged["ratio"], judged["pass"]) == ("b", "d", 1.091, True)
    runs[1]["of_bound"] = 0.89
    assert not offline_engines.judge("mixed", offline_engines.COMPARISONS["mixed"], {"runs": runs, "bound": {"tokens_per_second": 130.0}})[
        "pass"
    ]
