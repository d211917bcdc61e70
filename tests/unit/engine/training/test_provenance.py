"""The record of what a drafter was made from catches every prompt that it should not have seen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from engine.checkpoints import load_model
from engine.training.prompts import Prompt, balanced, digest, part_of, part_of_digest, split, spread
from engine.training.provenance import leaks, note_prompts, read_provenance
from engine.training.run import Recipe, train
from engine.training.trainer import TrainConfig
from tests.tiny_model import make_tiny_model

TEXTS = [f"count to {number} and stop" for number in range(60)]
BY_PART = {part: [text for text in TEXTS if part_of(text) == part] for part in range(10)}


def test_a_digest_says_which_part_a_prompt_is_in() -> None:
    assert [part_of_digest(digest(text)) for text in TEXTS] == [part_of(text) for text in TEXTS]
    assert digest("  Count to\n7 AND stop ") == digest(TEXTS[7])
    assert len({digest(text) for text in TEXTS}) == len(TEXTS)


@pytest.mark.parametrize(
    ("uses", "found"),
    [
        ({"trained": BY_PART[2], "calibrated": BY_PART[1], "judged": BY_PART[0], "benchmarks": BY_PART[3]}, ""),
        ({"trained": BY_PART[2], "benchmarks": [BY_PART[2][0].upper()]}, "1 benchmark prompts were trained on"),
        ({"calibrated": BY_PART[1], "benchmarks": BY_PART[1][:1]}, "1 benchmark prompts were calibrated on"),
        ({"trained": BY_PART[0][:2]}, "2 prompts outside of the training part"),
        ({"trained": BY_PART[1][:1]}, "1 prompts outside of the training part"),
        ({"calibrated": BY_PART[0][:1]}, "1 prompts outside of the calibration part"),
        ({"trained": BY_PART[2], "judged": BY_PART[2][:1]}, "1 judged prompts were trained"),
    ],
)
def test_a_prompt_used_against_the_rule_is_found(tmp_path: Path, uses: dict[str, list[str]], found: str) -> None:
    note_prompts(tmp_path, **uses)
    wrong = leaks(read_provenance(tmp_path))
    assert (wrong == []) if not found else wrong[0].startswith(found)


def test_training_records_what_it_used(tmp_path: Path) -> None:
    loaded = load_model(str(make_tiny_model(tmp_path / "tiny")))
    prompts = [Prompt(text, ("math", "chat")[number % 2]) for number, text in enumerate(TEXTS)]
    benchmarks = [BY_PART[5][0], BY_PART[1][0], "never among the prompts"]
    recipe = Recipe(layers=1, block_size=4, rank=4, samples=1, max_tokens=12)
    config = TrainConfig(steps=2, texts=1, anchors=4)
    train(loaded, prompts, tmp_path / "made", recipe=recipe, config=config, benchmarks=iter(benchmarks))
    record = read_provenance(tmp_path / "made")
    parts = split(prompts, benchmarks)
    assert record["trained"] == sorted(digest(prompt.text) for prompt in parts.train)
    assert record["calibrated"] == sorted(digest(prompt.text) for prompt in parts.calibrate)
    assert record["benchmarks"] == sorted(map(digest, benchmarks))
    assert leaks(record) == []
    again = note_prompts(tmp_path / "made", trained=[BY_PART[0][0], parts.train[0].text])
    assert len(again["trained"]) == len(record["trained"]) + 1
    assert leaks(again)


def test_a_balanced_choice_has_as_many_of_each_domain() -> None:
    prompts = [Prompt(f"{number}", domain) for domain, count in (("math", 9), ("code", 2), ("chat", 5)) for number in range(count)]
    chosen = balanced(prompts, 3)
    assert Counter(prompt.domain for prompt in chosen) == {"math": 3, "code": 2, "chat": 3}
    assert [prompt.domain for prompt in chosen[:3]] == ["math", "code", "chat"]
    assert [prompt.text for prompt in chosen if prompt.domain == "math"] == ["0", "1", "2"]


def test_a_spread_choice_comes_from_all_over_the_file() -> None:
    prompts = [Prompt(f"{number}", domain) for domain in ("math", "code") for number in range(200)]
    chosen = spread(prompts, 40)
    assert Counter(prompt.domain for prompt in chosen) == {"math": 40, "code": 40}
    assert 10 <= sum(int(prompt.text) < 100 for prompt in chosen if prompt.domain == "math") <= 30
    assert {*chosen} == {*spread(reversed(prompts), 40)}, "the order of the file does not matter"
