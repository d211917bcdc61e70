"""`longdraft drafter`: what drafts for a model, and making, judging and moving drafters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.output import AsJson, Failure, note, print_json, print_table
from service.cli.progress import counting

if TYPE_CHECKING:
    from engine.checkpoints import LoadedModel
    from engine.profile import Profiles

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The target: a registered name, a Hugging Face id or a path.")]
Folder = Annotated[Path, typer.Argument(metavar="DRAFTER", help="A drafter's folder.")]
Prompts = Annotated[Path, typer.Option("--prompts", help="JSONL lines with `prompt` and perhaps `domain`, or a batch job.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=2, help="Length of an answer at most.")]

app = typer.Typer(help="What drafts for a model, and making, judging and moving drafters.", no_args_is_help=True)


def register(parent: typer.Typer) -> None:
    parent.add_typer(app, name="drafter")


@app.command("list")
def list_drafters(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Also what `auto` finds for this target (loads it).")] = None,
    as_json: AsJson = False,
) -> None:
    """The built-in and registered drafters, and what `auto` would use for a model."""
    with readable_errors():
        from engine.checkpoints.drafters import read_folder
        from engine.drafters.builtin import TEXT_DRAFTERS
        from engine.drafters.sources import find_automatic, registry_folders, third_party

        rows: list[dict[str, Any]] = [{"name": name, "origin": "built in", "target": None, "tags": []} for name in TEXT_DRAFTERS]
        rows += [{"name": source.name, "origin": source.origin, "target": None, "tags": []} for source in third_party()]
        for place in registry_folders():
            for path in sorted(place.iterdir()) if place.is_dir() else []:
                if (path / "config.json").is_file():
                    folder = read_folder(path)
                    found = folder.record
                    rows.append({"name": folder.name, "origin": str(path), "target": found.get("target"), "tags": found.get("tags", [])})
        if model is not None:
            loaded = load(model)
            known = {row["origin"] for row in rows}
            target = loaded.model.spec.name
            rows += [
                {"name": source.name, "origin": source.origin, "target": target, "tags": list(source.tags)}
                for source in find_automatic(loaded.directory, loaded.model.spec)
                if source.origin not in known
            ]
    if as_json:
        print_json(rows)
    else:
        columns = ("name", "origin", "target", "tasks")
        print_table(columns, [(row["name"], row["origin"], row["target"], ", ".join(row["tags"])) for row in rows])


@app.command()
def inspect(drafter: Folder, as_json: AsJson = False) -> None:
    """A drafter's layout, sizes, needs, calibration and training record. Checks every tensor."""
    with readable_errors():
        from engine.checkpoints.drafters import read_folder
        from engine.checkpoints.drafters.check import block_shapes, check_tensors, eagle_shapes
        from engine.checkpoints.drafters.formats import MODEL, block_spec, eagle_spec

        folder = read_folder(drafter)
        tensors = folder.tensors()
        found: dict[str, Any] = {"name": folder.name, "layout": folder.layout, "path": str(folder.path)}
        found["parameters"] = sum(tensor.numel() for tensor in tensors.values())
        found["bytes"] = sum(tensor.nbytes for tensor in tensors.values())
        if folder.layout != MODEL:
            eagle = "eagle3" in folder.layout
            spec = eagle_spec(folder.config, folder.config.get("num_target_layers") or 1 << 20) if eagle else block_spec(folder.config)
            check_tensors(tensors, *(eagle_shapes(spec) if eagle else block_shapes(spec)), spec.format)  # type: ignore[arg-type]
            found |= {"hidden_states": list(spec.taps), "layers": spec.layers.num_layers, "draft_vocabulary": spec.draft_vocab_size}
            found["target"] = {"hidden_size": spec.needs.hidden_size, "vocabulary": spec.needs.vocab_size, "layers": spec.needs.num_layers}
        found |= {"calibration": folder.calibration, "record": folder.record}
    if as_json:
        print_json(found)
    else:
        print_table(("", ""), [(key, value) for key, value in found.items() if value not in ({}, None)])


@app.command()
def train(
    model: Model,
    prompts: Prompts,
    out: Annotated[Path, typer.Option("-o", "--output", help="The drafter's folder; a run that was stopped goes on from it.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.")] = 2000,
    benchmark: Annotated[
        list[Path] | None, typer.Option("--benchmark", help="Repeatable: files whose prompts are only ever judged by.")
    ] = None,
    layers: Annotated[int, typer.Option("--layers", min=1)] = 2,
    block_size: Annotated[int, typer.Option("--block-size", min=4, max=16)] = 7,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Of the sequential head; 0 is DFlash.")] = 64,
    head: Annotated[str, typer.Option("--head", help="vanilla, gated or rnn.")] = "vanilla",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers a prompt; the first is greedy.")] = 2,
    own_prompts: Annotated[
        int, typer.Option("--own-prompts", min=0, help="For each domain, prompts more that the model makes of the beginnings of yours.")
    ] = 0,
    max_tokens: MaxTokens = 384,
    disk: Annotated[float, typer.Option("--disk", min=0.001, help="Bound of the stored hidden states, in GiB.")] = 8.0,
    texts: Annotated[int, typer.Option("--texts", min=1, help="Texts an optimiser step.")] = 4,
    anchors: Annotated[int, typer.Option("--anchors", min=1, help="Blocks a text and step.")] = 32,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=1e-7)] = 6e-4,
    intermediate: Annotated[int, typer.Option("--intermediate-size", min=0, help="Of the drafter's MLPs (0: twice the hidden size).")] = 0,
    vocabulary: Annotated[
        int, typer.Option("--vocabulary", min=0, help="Tokens that a step compares; 0: all. A few thousand save most of a step on a CPU.")
    ] = 0,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.01, help="End the optimiser's steps after so long.")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N prompts.")] = None,
    dtype: Annotated[str, typer.Option("--dtype")] = "float32",
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of answers and hidden states, to share among runs (default: in the drafter's).")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate/--stored", help="Generate answers that are missing, or train on what there is.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Train a DSpark drafter on the model's own answers to these prompts, then calibrate it on prompts that it did not see.

    A tenth of the prompts, chosen by hash, and every --benchmark prompt stay out of both.
    """
    with readable_errors():
        from engine.training.prompts import read_prompts
        from engine.training.report import Report
        from engine.training.run import Recipe
        from engine.training.run import train as run_training
        from engine.training.trainer import TrainConfig

        size = int(disk * (1 << 30))
        recipe = Recipe(
            layers=layers,
            block_size=block_size,
            rank=rank,
            head=head,
            intermediate_size=intermediate,
            samples=samples,
            own_prompts=own_prompts,
            max_tokens=max_tokens,
            disk_bytes=size,
        )
        config = TrainConfig(
            steps=steps,
            texts=texts,
            anchors=anchors,
            learning_rate=learning_rate,
            vocabulary=vocabulary,
            seconds=None if minutes is None else minutes * 60.0,
            seed=seed,
        )
        given = read_prompts(prompts)[:limit]
        kept = [prompt.text for path in benchmark or [] for prompt in read_prompts(path)]
        with counting() as tick:
            record = run_training(
                load(model, dtype),
                given,
                out,
                recipe=recipe,
                config=config,
                benchmarks=kept,
                data=data,
                generate_missing=generate,
                profiles=step_times(),
                report=Report(note, tick),
            )
    if as_json:
        print_json(record)
    else:
        print(out)
        note(f"{record['steps']} steps on {record['texts']} texts in {record['seconds']:.0f} s; loss {record['last']['loss']}")


@app.command()
def calibrate(model: Model, drafter: Folder, prompts: Prompts, max_tokens: MaxTokens = 256, as_json: AsJson = False) -> None:
    """Fit a drafter's confidence on these prompts, and write calibration.json beside it."""
    with readable_errors():
        from engine.training.prompts import read_prompts
        from engine.training.report import Report
        from engine.training.run import calibrate as fit

        given = read_prompts(prompts)
        with counting() as tick:
            written = fit(load(model), drafter, given, max_tokens=max_tokens, profiles=step_times(), report=Report(note, tick))
    print_json(written) if as_json else print(drafter / "calibration.json")


@app.command("eval")
def evaluate(
    model: Model,
    prompts: Prompts,
    drafter: Annotated[
        list[str] | None,
        typer.Option("--drafter", help="Repeatable: a name or a folder (default: ngram, suffix, what `auto` finds, and the portfolio)."),
    ] = None,
    drafts: Annotated[int, typer.Option("--drafts", min=1, help="Drafts a request and step.")] = 7,
    max_tokens: MaxTokens = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=2.0)] = 0.0,
    max_sequences: Annotated[int | None, typer.Option("--max-sequences", min=1, help="Requests at once.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N prompts.")] = None,
    each: Annotated[int | None, typer.Option("--each", min=1, help="Only the first N prompts of every domain.")] = None,
    judged: Annotated[bool, typer.Option("--judged", help="Only the tenth of the prompts that training keeps for this.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Reliability diagrams: FILE.png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Acceptance length by domain (bonus token included) with 95% intervals, and calibration error before and after.

    Where the domains are math, code and chat, macro is the mean of the three.
    """
    if plot is not None:
        from service.cli.bench.plot import check_plot

        check_plot(plot)
    with readable_errors():
        from engine.drafters.builtin import PORTFOLIO, TEXT_DRAFTERS
        from engine.drafters.sources import find_automatic
        from engine.training.judge import evaluate as judge
        from engine.training.judge import plot_reliability
        from engine.training.prompts import balanced, read_prompts, split
        from engine.training.report import Report

        given = read_prompts(prompts)
        given = list(split(given).judged) if judged else given
        given = (given if each is None else balanced(given, each))[:limit]
        loaded = load(model)
        found = [source.origin for source in find_automatic(loaded.directory, loaded.model.spec) if Path(source.origin).is_dir()]
        names = drafter or [*TEXT_DRAFTERS, *found, *([PORTFOLIO] if found else [])]
        settings = {"temperature": temperature, "drafts": drafts, "max_tokens": max_tokens}
        with counting() as tick:
            report = judge(
                loaded,
                names,
                given,
                temperature=temperature,
                drafts=drafts,
                max_tokens=max_tokens,
                max_sequences=max_sequences,
                profiles=step_times(),
                report=Report(tick=tick) if as_json else Report(note, tick),
            )
        if plot is not None:
            plot_reliability(report, plot)
    rows = {name: one.row() for name, one in report.items()}
    details = {name: one.details() for name, one in report.items()}
    if as_json:
        print_json({"drafters": rows, "prompts": len(given), **settings, "details": details})
        return
    columns = sorted({column for row in rows.values() for column in row}, key=lambda name: (name in _LAST, name))
    table = [
        (name, *(_cell(value, details[name]["intervals"].get(column)) for column, value in _in(columns, row))) for name, row in rows.items()
    ]
    print_table(("drafter", *columns), table, right=columns)


_LAST = ("macro", "ece_before", "ece_after")


def _in(columns: list[str], row: dict[str, float | None]) -> list[tuple[str, float | None]]:
    return [(column, row.get(column)) for column in columns]


def _cell(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


@app.command()
def tag(
    drafter: Folder,
    tags: Annotated[list[str] | None, typer.Argument(metavar="TASK...", help="None: for every task.")] = None,
) -> None:
    """Say which tasks a drafter was made for: there it drafts from the start, elsewhere once it has proved to be the best.

    A task is what a batch's metadata (or a line's) calls `task`.
    """
    with readable_errors():
        from engine.checkpoints.drafters import read_folder
        from engine.training.export import set_tags

        print(", ".join(set_tags(read_folder(drafter), tags or [])) or "every task")


@app.command()
def pack(drafter: Folder, model: Model) -> None:
    """Copy a drafter into a model's folder, where `auto` finds it."""
    with readable_errors():
        from engine.checkpoints import fetch
        from engine.checkpoints.drafters import read_folder
        from engine.training.export import pack as copy

        print(copy(read_folder(drafter), fetch(source_of(model)).directory))


@app.command()
def export(
    drafter: Folder, model: Model, out: Annotated[Path, typer.Option("-o", "--output", help="A folder that does not exist yet.")]
) -> None:
    """Write DeepSpec's full layout, with the target's embedding and output head in it."""
    with readable_errors():
        from engine.checkpoints.drafters import read_folder
        from engine.training.export import export as write

        if out.exists():
            raise Failure(f"{out} exists already")
        print(write(read_folder(drafter), load(model).model.frozen(), out))


def source_of(model: str) -> str:
    """What a registered name stands for; anything else is a source by itself."""
    from service.config import load_settings

    settings = load_settings()
    name = settings.resolve_model(model)
    return model if name is None else settings.models[name].source


def load(model: str, dtype: str = "auto") -> LoadedModel:
    from engine.checkpoints import load_model

    return load_model(source_of(model), dtype=dtype, progress=note)


def step_times() -> Profiles:
    """This machine's, where every command keeps them. What jobs teach about drafters stays out: these are judged by their own drafts."""
    from engine.checkpoints import default_cache_dir
    from engine.profile import Profiles

    return Profiles(default_cache_dir(), keep_records=False)


@contextmanager
def readable_errors() -> Iterator[None]:
    """What the engine refuses becomes one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Failure(str(error)) from error
