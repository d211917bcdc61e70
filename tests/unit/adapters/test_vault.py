"""Secrets at rest."""

import stat
from pathlib import Path

import pytest

from service.adapters.vault import Vault
from service.errors import BucketRefused


def test_what_is_sealed_opens_for_the_same_project_only(tmp_path: Path) -> None:
    vault = Vault("a key", tmp_path / "none")
    sealed = vault.seal("proj_1", "hush")
    assert b"hush" not in sealed
    assert Vault("a key", tmp_path / "none").open("proj_1", sealed) == "hush"
    assert vault.seal("proj_1", "hush") != sealed
    with pytest.raises(BucketRefused, match="credentials_key"):
        vault.open("proj_2", sealed)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("spoil", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:5], lambda _: b""])
def test_damaged_or_foreign_bytes_do_not_open(tmp_path: Path, spoil) -> None:
    vault = Vault("a key", tmp_path / "none")
    sealed = vault.seal("p", "hush")
    with pytest.raises(BucketRefused):
        vault.open("p", spoil(sealed))
    with pytest.raises(BucketRefused):
        Vault("another", tmp_path / "none").open("p", sealed)


def test_without_a_configured_key_one_is_made_and_kept_privately(tmp_path: Path) -> None:
    path = tmp_path / "data" / "credentials_key"
    with pytest.raises(BucketRefused):
        Vault("", path).open("p", b"x" * 40)
    sealed = Vault("", path).seal("p", "hush")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Vault("", path).open("p", sealed) == "hush"
