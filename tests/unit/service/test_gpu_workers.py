"""Which GPUs `--gpus` means, without any: nvidia-smi is a script on the PATH."""

import pytest

from service.errors import ConfigError
from service.gpu_workers import choose_gpus, pinned, visible_gpus


@pytest.fixture
def smi(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\n[ "$1" = --query-gpu=index ] && printf "0\\n1\\n2\\n"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_all_that_the_driver_names(smi):
    assert visible_gpus() == ["0", "1", "2"]


def test_those_that_the_environment_leaves_visible(smi, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-8f1c")
    assert visible_gpus() == ["2", "GPU-8f1c"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_no_driver_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == []


def test_some_of_them_or_all():
    assert choose_gpus("all", ["0", "1"]) == ["0", "1"]
    assert choose_gpus("all", []) == []
    assert choose_gpus("1", ["0", "1"]) == ["1"]
    for wrong in ("2", "0,5", ""):
        with pytest.raises(ConfigError, match="visible here: 0, 1"):
            choose_gpus(wrong, ["0", "1"])


def test_a_worker_sees_one():
    assert pinned({"A": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, "1") == {"A": "1", "CUDA_VISIBLE_DEVICES": "1"}
