"""Prompts: where they come from, and which of them train, calibrate or judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.training.prompts import Prompt, part_of, read_prompts, split


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
