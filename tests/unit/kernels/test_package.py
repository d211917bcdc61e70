"""The package's name is also that of an optional Hugging Face package; both must be told apart."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import kernels
from kernels import clash


def _python(code: str, *paths: Path) -> str:
    import os

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, Path(kernels.__file__).parents[1]]))}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_does_no_work() -> None:
    loaded = _python("import sys, kernels; print([m for m in ('torch', 'triton', 'numpy', 'transformers') if m in sys.modules])")
    assert loaded == "[]"


def test_transformers_does_not_take_ours_for_the_hugging_face_package() -> None:
    from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available

    assert not is_kernels_available(), f"it would use versions from {KERNELS_MIN_VERSION} to {KERNELS_MAX_VERSION}"


@pytest.mark.parametrize("first", ["kernels", "transformers"])
def test_transformers_runs_a_model_beside_our_package(first: str) -> None:
    code = (
        f"import {first}; import kernels, torch; from transformers import LlamaConfig, LlamaForCausalLM;"
        "c = LlamaConfig(vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2);"
        "out = LlamaForCausalLM(c)(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits;"
        "print(tuple(out.shape), kernels.__version__)"
    )
    assert _python(code).splitlines()[-1] == f"(1, 3, 17) {kernels.__version__}"


def test_version_is_the_distributions() -> None:
    assert metadata.version("longdraft") == kernels.__version__


def test_a_clash_is_seen_from_the_distribution_alone(tmp_path: Path) -> None:
    """pip writes both packages into one folder, so only the metadata tells."""
    info = tmp_path / "kernels-0.18.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.3\n")
    assert _python("from kernels.clash import installed_hf_kernels as f; print(f())", tmp_path) == "0.18.3"


def test_no_clash_here_and_a_message_that_helps() -> None:
    assert clash.installed_hf_kernels() is None
    assert "pip uninstall kernels" in clash.clash_message("0.18.3")


def test_every_op_has_its_reference() -> None:
    for op in kernels.__all__:
        assert callable(kernels._implementation(op, "cpu"))
        assert callable(kernels._implementation(op, "cuda")), "without a Triton version a GPU runs the reference"
