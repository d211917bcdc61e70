"""What `make` installs is written down: every dependency has a pinned version, and the Makefile names the ones that are chosen by build."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHOSEN_IN_MAKEFILE = {"torch", "triton"}


def name_of(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-").replace(".", "-")


def pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines)
    return {name_of(line) for line in lines}


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = list(project["project"]["dependencies"]) + project["build-system"]["requires"]
    wanted += [requirement for requirements in extras.values() for requirement in requirements]
    assert {name_of(requirement) for requirement in wanted} - pins() == CHOSEN_IN_MAKEFILE


def test_the_makefile_installs_every_extra():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    installed = set(re.search(r"--editable \"\.\[([a-z,]+)\]\"", (ROOT / "Makefile").read_text())[1].split(","))
    assert installed == extras


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split())
    described = set(re.findall(r"^([a-z]+):.*## ", makefile, re.M))
    assert targets == described
