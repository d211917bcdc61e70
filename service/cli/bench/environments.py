"""Where the peers' environments are, and how their drivers are started in them."""

from __future__ import annotations

import os
from pathlib import Path

import service
from service.cli.bench.peers import PEERS, STAMP
from service.cli.output import Failure


def stamp(folder: Path, peer: str) -> str:
    """What is installed for `peer`. Raises Failure where nothing is."""
    try:
        return (folder / peer / STAMP).read_text(encoding="utf-8")
    except OSError:
        raise Failure(
            f"{peer} is not installed in {folder / peer}: python -m tests.benchmarks.peers.install {peer} (in a checkout) makes an "
            f"environment there from the package {PEERS[peer].package}; --peers names another folder."
        ) from None


def driver(folder: Path, peer: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a peer's driver. Its interpreter sees of ours only the package with the drivers, not what we depend on."""
    stamp(folder, peer)
    ours = folder / peer / "driver"
    link, source = ours / "service", Path(service.__file__).parent
    ours.mkdir(exist_ok=True)
    if not link.is_symlink() or link.readlink() != source:
        link.unlink(missing_ok=True)
        link.symlink_to(source)
    python = folder.absolute() / peer / "bin" / "python"
    path = os.pathsep.join((str(python.parent), os.environ.get("PATH", os.defpath)))  # compilers that came with the peer
    environment = {**os.environ, "PYTHONPATH": str(ours.absolute()), "PATH": path}
    return [str(python), "-m", f"service.cli.bench.peers.{PEERS[peer].driver}"], environment
