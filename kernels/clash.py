"""Detects Hugging Face's package of the same import name. Standard library only."""

from __future__ import annotations

from importlib import metadata


def installed_hf_kernels() -> str | None:
    """Version of the installed distribution named `kernels`, or None.

    That distribution and Longdraft put their files into one folder, so whichever was installed last has overwritten the
    other's `__init__.py`. Where this returns a version, both packages must be considered broken.
    """
    try:
        return metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return None


def clash_message(version: str) -> str:
    """What to tell the user about an installed `kernels` distribution."""
    return (
        f"the Hugging Face package 'kernels' {version} is installed and has the same import name as Longdraft's kernels; "
        "remove it with `pip uninstall kernels`, then reinstall longdraft (transformers runs without it)"
    )
