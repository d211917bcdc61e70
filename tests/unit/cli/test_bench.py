"""The benchmark: its bookkeeping with scripted runs, and the whole of it on a tiny model."""

import json
import re
import sys
from dataclasses import replace

import pytest

from service.cli.bench import session, statistics
from service.cli.bench.plan import BenchRequest, Task
from service.cli.bench.plot import plot_bench
from service.cli.bench.report import print_bench
from service.cli.bench.session import run_bench
from service.cli.output import Failure
from service.config import ModelEntry, load_settings
from tests.tiny_model import make_tiny_model


def job(path, count=6, **body):
    lines = []
    for number in range(count):
        content = {
            "model": "any",
            "messages": [{"role": "user", "content": f"count {number} " * (number + 1)}],
            "max_tokens": 6 + number,
            **body,
        }
        lines.append(json.dumps({"custom_id": f"id-{number}", "method": "POST", "url": "/v1/chat/completions", "body": content}))
    path.write_text("\n".join(lines))
    return path


def request(tmp_path, source="tiny", **changes):
    settings = load_settings({"HOME": str(tmp_path)}, cache_dir=tmp_path / "cache", models={"tiny": {"source": str(source)}})
    settings = settings.model_copy(
        update={"engine": settings.engine.model_copy(update={"device": "cpu", "kv_memory": "4MiB", "threads": 1})}
    )
    values = {"dtype": "float32", "configurations": ["drafter=auto"], "compare": [], "batch_sizes": "2,4", "repeats": 2}
    values |= {
        "limit": None,
        "check": True,
        "bound": False,
        "peer_drafts": True,
        "contenders": False,
        "peers_folder": tmp_path / "peers",
    } | changes
    return BenchRequest.of(
        values.pop("job", None) or job(tmp_path / "job.jsonl"), settings=settings, resolve_model=lambda _: "tiny", **values
    )


class Script:
    """Stands in for the processes: speeds by configuration, answers that are right or not."""

    def __init__(self, speed, wrong=()):
        self.speed, self.wrong, self.runs, self.lines = speed, wrong, [], []

    def __call__(self, _, task, label):
        key = task.options["drafter"] if task.kind == "longdraft" else task.options.get("prompt_lookup") or task.options["batch_size"]
        self.runs.append((task.kind, key))
        self.lines.append([line.custom_id for line in task.lines])
        answers = {line.custom_id: ["text", 10] for line in task.lines}
        if key in self.wrong:
            answers["id-0"] = ["something else", 10]
        return {"seconds": 60 / self.speed[key], "answers": answers, "device": "gpu", "peak_rss_bytes": 1000 * len(self.runs)}


SLOW_PEER = """#!/bin/sh
exec {python} -c '
import json, sys, time
sys.stdin.read()
print(json.dumps({{"done": 0}}), flush=True)
time.sleep(60)
'
"""


@pytest.fixture
def script(monkeypatch):
    def install(script):
        monkeypatch.setattr(session._Session, "run", lambda self, task, label: script(self, task, label))
        return script

    return install


def test_the_best_batch_size_is_found_once_and_runs_are_interleaved(tmp_path, script):
    plan = request(tmp_path, compare=["transformers"], configurations=["drafter=auto", "drafter=off"])
    first = script(Script({1: 1, 2: 30, 4: 20, 8: 5, "auto": 50, "off": 40}, wrong=["off"]))
    report = run_bench(plan, cache_dir=tmp_path, quiet=True)
    sweep = [("transformers", 1), ("transformers", 2), ("transformers", 4)]
    repeat = [("longdraft", "auto"), ("longdraft", "off"), ("transformers", 2), ("transformers", 8)]
    assert first.runs == sweep + repeat * 2
    assert {run["name"]: run["tokens_per_second"]["median"] for run in report["runs"]} == {
        "longdraft, drafter auto": 50.0,
        "longdraft, drafter off": 40.0,
        "transformers, static batches of 2": 30.0,
        "transformers, one by one, prompt lookup of 8": 5.0,
    }
    assert [run["identical_to_reference"] for run in report["runs"]] == [[6, 6], [5, 6], [6, 6], [6, 6]]
    assert [(ratio["to"], ratio["median"]) for ratio in report["ratios"]][1] == (
        "transformers, static batches of 2",
        pytest.approx(5 / 3, abs=1e-3),
    )
    assert report["runs"][0]["output_tokens"] == 60

    again = script(Script({1: 1, 2: 30, 4: 20, 8: 5, "auto": 50, "off": 40}))
    run_bench(plan, cache_dir=tmp_path, quiet=True)
    assert again.runs == repeat * 2, "reference and sweep are kept"


def test_only_contenders_are_repeated_and_a_slow_peer_is_stopped(tmp_path, monkeypatch):
    runs = []
    speeds = {"auto": 50, ("vllm", 4): 40, ("vllm", 2): 10, ("transformers", 4): 30}

    def run(self, task, label, *, stop_after=None):
        key = task.options["drafter"] if task.kind == "longdraft" else (task.kind, next(iter(task.options.values())))
        key = "drafts" if len(task.options) == 2 else key
        seconds = 60 / speeds.get(key, 1)
        runs.append((key, stop_after))
        if stop_after is not None and seconds > stop_after:
            return {"stopped": True, "seconds": stop_after, "answers": {}}
        answers = {line.custom_id: ["text", 10] for line in task.lines}
        return {"seconds": seconds, "answers": answers, "device": "cpu", "peak_rss_bytes": 1}

    monkeypatch.setattr(session._Session, "run", run)
    monkeypatch.setattr(session._Session, "_version", lambda self, peer: "1")
    plan = request(tmp_path, compare=["vllm", "transformers"], contenders=True, check=False)
    report = run_bench(plan, cache_dir=tmp_path, quiet=True)
    trials = [(("vllm", 4), None), (("vllm", 2), 3.0), ("drafts", 3.0), (("transformers", 4), 3.0), (("transformers", 2), 3.0)]
    repeats = [("auto", None), (("vllm", 4), None)]
    assert runs == [*trials, ("drafts", 3.0), *repeats * 2]
    rows = {run["name"]: (len(run["seconds"]), run["stopped"], run["tokens_per_second"]["median"]) for run in report["runs"]}
    assert rows == {
        "longdraft, drafter auto": (2, False, 50.0),
        "vllm, compiled, 4 sequences": (2, False, 40.0),
        "vllm, n-gram 8, 4 sequences": (1, True, 0.0),
        "transformers, static batches of 4": (1, False, 30.0),
        "transformers, one by one, prompt lookup of 8": (1, True, 0.0),
    }
    assert [ratio["to"] for ratio in report["ratios"]] == ["vllm, compiled, 4 sequences", "transformers, static batches of 4"]
    print_bench(report)
    plot_bench(report, tmp_path / "chart.svg")
    texts = re.findall("<!-- *(.*) -->", (tmp_path / "chart.svg").read_text())  # of a chart, where they are drawn as outlines
    assert texts.count("stopped after 3 s") == 2
    assert "stopped: not done in 2 times the fastest peer's time" in texts
    assert texts.count("0") == 1, "on the axis: no run is said to have made 0 tokens a second"
    runs.clear()
    run_bench(plan, cache_dir=tmp_path, quiet=True)
    assert runs == repeats * 2, "trials are kept, also those that were stopped"


def test_a_run_is_stopped_so_long_after_it_is_loaded(tmp_path):
    plan = request(tmp_path, make_tiny_model(tmp_path / "model"), check=False)
    python = tmp_path / "peers" / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(SLOW_PEER.format(python=sys.executable))
    python.chmod(0o755)
    (tmp_path / "peers" / "vllm" / "installed.txt").write_text("scripted")
    with session._display(True) as display:
        made = session._Session(plan, tmp_path / "store", display)
        outcome = made.run(plan.task("vllm", {"max_num_seqs": 1}), "slow", stop_after=0.2)
    assert outcome == {"stopped": True, "seconds": 0.2, "answers": {}}


def test_another_job_or_format_has_a_reference_and_a_sweep_of_its_own(tmp_path):
    plan = request(tmp_path)
    assert plan.digest() == request(tmp_path).digest()
    assert plan.digest() != request(tmp_path, limit=3).digest()
    assert plan.digest("float32") != plan.digest("bfloat16")


def test_lines_are_run_greedily_and_the_limit_counts_from_the_start(tmp_path):
    plan = request(tmp_path, job=job(tmp_path / "hot.jsonl", temperature=0.9), limit=2)
    assert [line.custom_id for line in plan.lines] == ["id-0", "id-1"]
    assert {line.body["temperature"] for line in plan.lines} == {0}
    assert {line.body["model"] for line in plan.lines} == {"tiny"}


def test_a_task_survives_the_way_to_its_process(tmp_path):
    task = request(tmp_path).task("longdraft", {"drafter": "off", "max_sequences": 3})
    assert Task.decode(task.encode()) == replace(task, lines=list(task.lines))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compare": ["sglang"]}, "sglang"),
        ({"compare": ["vllm"], "dtype": "bfloat16"}, "float32 only"),
        ({"batch_sizes": "8,many"}, "8,many"),
        ({"batch_sizes": "0"}, "0"),
        ({"configurations": ["draftr=off"]}, "draftr"),
        ({"configurations": ["max_sequences=0"]}, "max_sequences"),
    ],
)
def test_unknown_options_are_named(tmp_path, changes, words):
    with pytest.raises(Failure, match=words):
        request(tmp_path, **changes)


def test_a_job_with_a_bad_line_is_refused(tmp_path):
    path = job(tmp_path / "job.jsonl")
    path.write_text(path.read_text() + "\nnot json")
    with pytest.raises(Failure, match="line 7"):
        request(tmp_path, job=path)


def test_for_real_on_a_tiny_model(tmp_path, capsys):
    folder = make_tiny_model(tmp_path / "model")
    plan = request(tmp_path, folder, compare=["transformers"], batch_sizes="4", repeats=1, bound=True, peer_drafts=False)
    assert plan.entry == ModelEntry(source=str(folder))
    report = run_bench(plan, cache_dir=tmp_path / "cache", quiet=True)
    assert report["job"] == "job.jsonl"
    assert report["device"].startswith("cpu: ")
    for run in report["runs"]:
        assert run["identical_to_reference"] == [6, 6]
        assert run["peak_rss_bytes"] > 50 << 20
        assert run["tokens_per_second"]["min"] > 0
    assert len({run["output_tokens"] for run in report["runs"]}) == 1
    assert report["runs"][0]["kv_peak_bytes"] > 0
    bound = report["bound"]
    assert bound["prompt_positions"] > bound["distinct_prompt_positions"] > 6, "all lines start alike"
    assert bound["tokens_per_second_at_best"] >= bound["tokens_per_second"] > bound["tokens_per_second_without_sharing"] > 0
    first, second = bound["stretches"]
    for name in ("body", "head"):
        assert len(first[name]) == 3
        assert [(one["rows"], one["layout"]) for one in first[name]] == [(one["rows"], one["layout"]) for one in second[name]]
    print_bench(report)
    assert "6 of 6" in capsys.readouterr().out
    plot_bench(report, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_bound_is_measured_before_every_run_and_is_the_median(tmp_path, monkeypatch):
    runs = []
    # Of 6 lines with 10 tokens each: 100 + 60 - 6 positions of the layers, 60 of the head.
    seconds = iter(((0.01, 0.05), (0.03, 0.01), (0.02, 0.04)))

    def run(self, task, label):
        runs.append((task.kind, dict(task.options) if task.kind == "bound" else None))
        if task.kind == "longdraft":
            answers = {line.custom_id: ["text", 10] for line in task.lines}
            return {"seconds": 8.0, "answers": answers, "device": "cpu", "peak_rss_bytes": 1}
        rates = [{"rows": 64, "layout": "ours", "seconds": now, "least": 0.01} for now in next(seconds)]
        places = {"prompt_positions": 100, "distinct_prompt_positions": 100, "lines": 6}
        return {"seconds": 0.0, "bound": {"body": rates, "head": rates, "body_parameters": 10**9, **places}}

    monkeypatch.setattr(session._Session, "run", run)
    report = run_bench(request(tmp_path, check=False, bound=True, repeats=3), cache_dir=tmp_path, quiet=True)
    assert [kind for kind, _ in runs] == ["bound", "longdraft"] * 3
    assert runs[0][1] == {}
    assert runs[2][1]["body"][0]["layout"] == "ours", "what was found at first"
    bound = report["bound"]
    assert (bound["body_seconds"], bound["gflops"], len(bound["stretches"])) == (0.02, 100.0, 3), "the first has the lower median"
    assert bound["tokens_per_second"] == round(60 / (0.02 * (154 + 60)), 2)
    assert bound["tokens_per_second_at_best"] == round(60 / (0.01 * (154 + 60)), 2)
    assert report["runs"][0]["of_bound"] == pytest.approx((60 / 8) / (60 / 4.28), abs=1e-3)


def test_a_reference_is_kept_line_by_line(tmp_path, script):
    first = script(Script({1: 1, "auto": 50}))
    run_bench(request(tmp_path, limit=2, repeats=1), cache_dir=tmp_path, quiet=True)
    more = script(Script({1: 1, "auto": 50}))
    run_bench(request(tmp_path, limit=4, repeats=1), cache_dir=tmp_path, quiet=True)
    assert first.lines == [["id-0", "id-1"], ["id-0", "id-1"]]
    assert more.lines == [["id-2", "id-3"], ["id-0", "id-1", "id-2", "id-3"]], "only the new lines are looked up"


PEER = """#!/bin/sh
exec {python} -c '
import json, sys
job = json.load(sys.stdin)
print(json.dumps({{"done": 1}}))
tokens = {{prompt["id"]: [65, 66, job["ends"][0], 67] for prompt in job["prompts"]}}
print(json.dumps({{"seconds": 2.0, "tokens": tokens, "device": "cpu", "peak_rss_bytes": 5}}))
'
"""


def test_a_peer_runs_in_its_own_environment_and_answers_in_tokens(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    plan = request(tmp_path, folder, compare=["vllm"], batch_sizes="4", repeats=1, check=False, limit=3)
    with pytest.raises(Failure, match=r"tests\.benchmarks\.peers\.install vllm"):
        run_bench(plan, cache_dir=tmp_path / "cache", quiet=True)
    python = tmp_path / "peers" / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PEER.format(python=sys.executable))
    python.chmod(0o755)
    (tmp_path / "peers" / "vllm" / "installed.txt").write_text("scripted")
    report = run_bench(plan, cache_dir=tmp_path / "cache", quiet=True)
    plain, ngram = report["runs"][1:]
    assert plain["name"] == "vllm, compiled, 3 sequences"
    assert ngram["options"] == {"max_num_seqs": 3, "ngram": 8}
    assert plain["output_tokens"] == 9, "answers end with their end token"
    assert plain["tokens_per_second"]["median"] == 4.5


def test_intervals_are_order_statistics():
    assert statistics.median_interval([3.0, 1.0, 2.0]).row() == {"median": 2.0, "low": 1.0, "high": 3.0, "confidence": 0.75}
    many = statistics.median_interval([float(value) for value in range(1, 21)])
    assert (many.low, many.high) == (6.0, 15.0), "the tabled 95% interval of 20 values"
    assert 0.95 <= many.confidence < 0.97
    assert statistics.ratio([2.0, 6.0], [1.0, 2.0]).median == 2.5


def test_a_run_that_fails_gives_its_reason(tmp_path):
    with pytest.raises(Failure, match="nowhere"):
        run_bench(request(tmp_path, tmp_path / "nowhere", check=False, repeats=1), cache_dir=tmp_path, quiet=True)


def test_the_papers_figures_on_a_model_with_a_drafter_beside_it(tmp_path, capsys):
    from engine.checkpoints import load_model
    from engine.checkpoints.drafters.formats import block_spec
    from engine.training.export import write_folder
    from engine.training.module import BlockModule
    from engine.training.run import Recipe, drafter_config
    from service.cli.bench.paper import PaperPlan, plot_paper, print_paper, run_paper

    model = make_tiny_model(tmp_path / "tiny")
    config = drafter_config(load_model(str(model)), Recipe(layers=1, block_size=4, rank=8))
    write_folder(model / "drafters" / "spark", config, BlockModule(block_spec(config)).tensors(), {"name": "spark"})
    loaded = load_model(str(model))
    plan = PaperPlan((1, 4), lengths=(1, 3), block=3, max_tokens=8, repeats=2, dollars_per_hour=0.36)
    report = run_paper(loaded, request(tmp_path, model).lines, plan, lambda _: None)
    figures = report["figures"]
    assert set(figures["2"]) == {"ngram", "suffix", "spark"}
    assert [len(row["by_position"]) for row in figures["2"].values()] == [3, 3, 3]
    assert [row["drafts"] for row in figures["5"]["fixed"]] == [1, 3]
    assert all(1.0 <= row["acceptance_length"] <= row["drafts"] + 1 for row in figures["5"]["fixed"])
    assert len(figures["6"]["spark"]["before"]) == 3
    assert [(row["sequences"], row["kind"]) for row in figures["8"]] == [
        (n, kind) for n in (1, 4) for kind in ("plain", "fixed", "planned")
    ]
    for row in figures["8"]:
        assert row["dollars_per_million_tokens"] == pytest.approx(0.36 / 3600 / row["tokens_per_second"] * 1e6, rel=1e-3)
    plot_paper(report | {"device": "cpu"}, tmp_path / "paper.png")
    assert (tmp_path / "paper.png").stat().st_size > 20_000
    print_paper(report | {"dollars_per_hour": None})
    assert "no hourly rate" in capsys.readouterr().err
