"""Where drafters come from: inside the target's checkpoint, beside it, the registry folders, what a user names, third parties."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, cast

from engine.checkpoints.drafters.errors import DrafterError
from engine.checkpoints.drafters.folder import DrafterFolder, read_folder
from engine.checkpoints.drafters.formats import DEEPSPEC, DEEPSPEC_EAGLE, EAGLE, MODEL, SPECULATORS, ZLAB, block_spec, eagle_spec
from engine.checkpoints.packaged import PACKAGED
from engine.checkpoints.sources import default_cache_dir, fetch

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.batch import ModelSpec
    from engine.checkpoints.drafters.specs import BlockSpec, EagleSpec
    from engine.drafters.base import Drafter, Host

_log = logging.getLogger(__name__)

ENTRY_POINTS = "longdraft.drafters"
"""Group of third-party drafters: each entry is a callable that takes a `Host` and returns a `Drafter`."""
BESIDE = "drafters"
"""Folder of a model's checkpoint in which packed drafters lie, one folder each."""
SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True, slots=True)
class Source:
    """A drafter that could be made. bytes_per_token: what it keeps for each token of the target's KV cache.

    automatic: `auto` may choose it. origin: where it was found, for people. tags: the templates it was made for; none: all. stamp: differs
    once its files were exchanged.
    """

    name: str
    origin: str
    make: Callable[[Host], Drafter]
    bytes_per_token: int = 0
    automatic: bool = True
    tags: tuple[str, ...] = ()
    stamp: tuple[object, ...] = ()


def registry_folders() -> list[Path]:
    """Where registered drafters lie: the user's own first, then those that come with Longdraft."""
    return [default_cache_dir() / "drafters", SHIPPED]


def find_automatic(directory: Path | None, spec: ModelSpec) -> list[Source]:
    """What `auto` knows for this target, the first place that has any: inside the checkpoint, beside it, the registry.

    A drafter that cannot be used is passed over with a warning that says why: a model must run without it.
    """
    for found in (_inside(directory, spec), _beside(directory, spec), _registered(spec)):
        if found:
            return found
    return []


def places_stamp(directory: Path | None) -> tuple[object, ...]:
    """Differs once a drafter was added to, removed from or exchanged in the places where `auto` looks. Costs a few looks at folders."""
    places = [*registry_folders(), *([] if directory is None else [directory / BESIDE])]
    return tuple((str(path), _stamp(path)) for place in places for path in _folders(place))


def named(text: str, spec: ModelSpec) -> Source:
    """What a user names: a folder, a registered drafter, a packaged model, or a Hugging Face id. Raises DrafterError where it is none."""
    path = Path(text).expanduser()
    if path.is_dir():
        return from_folder(read_folder(path), spec)
    for folder in registry_folders():
        if (folder / text / "config.json").is_file():
            return from_folder(read_folder(folder / text), spec)
    if text in PACKAGED or "/" in text:
        try:
            checkpoint = fetch(text)
        except (ValueError, OSError) as error:
            raise DrafterError(f"the drafter {text!r} cannot be fetched: {error}") from error
        return from_folder(read_folder(checkpoint.directory), spec, name=checkpoint.name)
    raise DrafterError(f"there is no drafter {text!r}: it is no folder, no registered drafter, no packaged model and no Hugging Face id")


def third_party() -> list[Source]:
    """Drafters of installed distributions, by entry point."""
    return [Source(entry.name, f"entry point {entry.value}", _loader(entry), automatic=False) for entry in entry_points(group=ENTRY_POINTS)]


def _loader(entry: EntryPoint) -> Callable[[Host], Drafter]:
    return lambda host: cast("Drafter", entry.load()(host))


def from_folder(folder: DrafterFolder, spec: ModelSpec, *, name: str | None = None) -> Source:
    """Raises DrafterError where its config is wrong."""
    name, tags, stamp = name or folder.name, tuple(folder.record.get("tags", ())), _stamp(folder.path)
    size, origin = spec.dtype.itemsize, str(folder.path)
    if folder.layout in (DEEPSPEC, ZLAB, *SPECULATORS[:2]):
        needs = _block_bytes(block_spec(folder.config)) * size
        return Source(name, origin, lambda host: _dspark(folder, host), needs, tags=tags, stamp=stamp)
    if folder.layout in (EAGLE, DEEPSPEC_EAGLE, SPECULATORS[2]):
        needs = _eagle_bytes(eagle_spec(folder.config, spec.num_layers)) * size
        return Source(name, origin, lambda host: _eagle(folder, host), needs, tags=tags, stamp=stamp)
    assert folder.layout == MODEL
    return Source(name, origin, lambda host: _draft_model(name, folder, host), _model_bytes(folder) * size, automatic=False, stamp=stamp)


def _dspark(folder: DrafterFolder, host: Host) -> Drafter:
    from engine.drafters.dspark import DSparkDrafter

    return DSparkDrafter.load(folder, host)


def _eagle(folder: DrafterFolder, host: Host) -> Drafter:
    from engine.drafters.eagle3 import Eagle3Drafter

    return Eagle3Drafter.load(folder, host)


def _draft_model(name: str, folder: DrafterFolder, host: Host) -> Drafter:
    from engine.checkpoints import load_model
    from engine.drafters.cross_vocab import CrossVocabDrafter
    from engine.drafters.draft_model import DraftModelDrafter
    from engine.drafters.parts.tokenizers import same_vocabulary

    target = host.target.spec
    loaded = load_model(str(folder.path), dtype=str(target.dtype).removeprefix("torch."), device=str(target.device))
    if same_vocabulary(loaded.tokenizer, host.tokenizer.hf) and loaded.model.spec.vocab_size == target.vocab_size:
        return DraftModelDrafter(name, loaded.model, host)
    return CrossVocabDrafter(name, loaded.model, loaded.tokenizer, host)


def _inside(directory: Path | None, spec: ModelSpec) -> list[Source]:
    if directory is None or not (directory / "config.json").is_file():
        return []
    from engine.checkpoints.drafters.mtp import mtp_heads

    try:
        heads = mtp_heads(directory)
    except DrafterError as error:
        _log.warning("the heads inside %s are not used: %s", directory, error)
        return []
    if heads is None:
        return []

    def make(host: Host) -> Drafter:
        from engine.drafters.mtp import MtpDrafter

        return MtpDrafter.load(heads, host)

    return [Source("mtp", f"inside {directory}", make, heads.bytes_per_token * spec.dtype.itemsize)]


def _beside(directory: Path | None, spec: ModelSpec) -> list[Source]:
    return [] if directory is None else _in_folder(directory / BESIDE, spec, registered=False)


def _registered(spec: ModelSpec) -> list[Source]:
    found: list[Source] = []
    for place in registry_folders():
        found += _in_folder(place, spec, registered=True)
    return found


def _in_folder(place: Path, spec: ModelSpec, *, registered: bool) -> list[Source]:
    found = []
    for path in _folders(place):
        try:
            folder = read_folder(path)
            if not registered or _made_for(folder, spec):
                found.append(from_folder(folder, spec))
        except DrafterError as error:
            _log.warning("the drafter in %s is not used: %s", path, error)
    return found


def _folders(place: Path) -> list[Path]:
    """Drafters in a place; what begins with a dot is still being written."""
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if not path.name.startswith(".") and (path / "config.json").is_file())


def _stamp(folder: Path) -> tuple[object, ...]:
    """Sizes and times of what a drafter is made from."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            status = path.stat()
            found.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _made_for(folder: DrafterFolder, spec: ModelSpec) -> bool:
    """By its record: trained on this model's answers and hidden states, of this revision where it names one."""
    if folder.record.get("target") != spec.name:
        return False
    revision = folder.record.get("target_revision")
    if revision in (None, spec.revision):
        return True
    _log.warning(
        "the drafter in %s is not used: it was trained for revision %s of %s, and this is %s; it can still be asked for by name",
        folder.path, revision, spec.name, spec.revision,
    )  # fmt: skip
    return False


def _block_bytes(spec: BlockSpec) -> int:
    return 2 * spec.layers.num_layers * spec.layers.num_kv_heads * spec.layers.head_dim


def _eagle_bytes(spec: EagleSpec) -> int:
    return spec.layers.hidden_size + 2 * spec.layers.num_layers * spec.layers.num_kv_heads * spec.layers.head_dim


def _model_bytes(folder: DrafterFolder) -> int:
    config = folder.config
    heads = config.get("num_attention_heads") or 1
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // heads
    return int(2 * config.get("num_hidden_layers", 0) * (config.get("num_key_value_heads") or heads) * head_dim)
