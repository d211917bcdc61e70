"""Machine code that is kept on disk is run where it is whole and this user's own, and compiled anew everywhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kernels import native

if native.available():
    from kernels.native import objects
    from kernels.native.objects import Objects

pytestmark = pytest.mark.skipif(not native.available(), reason="needs llvmlite, a processor with AVX2, and torch on GNU OpenMP")

KEY = "a" * 64
PRODUCT = """
import sys
from pathlib import Path
import torch
import kernels
from kernels.native import jit

compiled, machine_code = [], jit._machine_code

def counted(text):
    compiled.append(text)
    return machine_code(text)

jit._machine_code = counted
kernels.keep_compiled(Path(sys.argv[1]))
torch.manual_seed(0)
x, weight = torch.randn(3, 48), torch.randn(32, 48)
found = kernels.linear(x, kernels.pack_linear(weight))
torch.testing.assert_close(found, x @ weight.T)
print(len(compiled), found.sum().item())
"""


def product(folder: Path) -> tuple[int, float]:
    """In a process of its own: how many kernels were compiled for it, and what came out."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PRODUCT), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    count, total = done.stdout.split()
    return int(count), float(total)


def test_a_second_process_compiles_nothing_unless_what_was_kept_is_spoilt(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "native"
    compiled, expected = product(folder)
    kept = sorted(folder.iterdir())
    assert compiled == len(kept) > 0
    assert product(folder) == (0, expected)
    whole = kept[0].read_bytes()
    kept[0].write_bytes(whole[:-1])
    assert product(folder) == (1, expected)
    assert kept[0].read_bytes() == whole
    assert sorted(folder.iterdir()) == kept, "nothing else lies there"


def test_a_folder_that_cannot_be_made_costs_the_compilation_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = Objects(tmp_path / "file" / "native")
    kept.put(KEY, b"machine code")
    assert kept.get(KEY) is None


@pytest.mark.parametrize("spoil", [lambda found: found[:-1], lambda found: found[:40] + b"!" + found[41:], lambda _: b""])
def test_only_whole_code_comes_back(tmp_path: Path, spoil) -> None:
    kept = Objects(tmp_path / "native")
    assert kept.get(KEY) is None
    kept.put(KEY, b"machine code")
    assert kept.get(KEY) == b"machine code"
    (path,) = (tmp_path / "native").iterdir()
    path.write_bytes(spoil(path.read_bytes()))
    assert kept.get(KEY) is None
    kept.put(KEY, b"machine code")
    assert kept.get(KEY) == b"machine code"


@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_others_could_have_written_is_not_run(tmp_path: Path, which: str) -> None:
    folder = tmp_path / "native"
    kept = Objects(folder)
    kept.put(KEY, b"machine code")
    path = folder if which == "folder" else folder / KEY
    mode = path.stat().st_mode
    path.chmod(mode | 0o002)
    assert kept.get(KEY) is None
    path.chmod(mode | 0o020)
    assert kept.get(KEY) == b"machine code"
    if os.geteuid() == 0:
        os.chown(path, -1, 65534)
        assert kept.get(KEY) is None, "another group's"
        path.chmod(mode)
        assert kept.get(KEY) == b"machine code"
        os.chown(path, 65534, -1)
        assert kept.get(KEY) is None, "another user's"


def test_what_was_used_longest_ago_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_MOST", 3)
    kept = Objects(tmp_path)
    for age, key in enumerate("abc"):
        kept.put(key, key.encode())
        os.utime(tmp_path / key, (1000 + age,) * 2)
    assert kept.get("a") == b"a"
    kept.put("d", b"d")
    assert [kept.get(key) for key in "abcd"] == [b"a", None, b"c", b"d"]
