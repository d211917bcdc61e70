"""The engine as an InferenceRunner: the only part of the service that loads torch."""

from engine.threads import wait_politely

wait_politely()  # must come before torch is loaded, which the next import does

from service.adapters.engine_runner.runner import EngineRunner, checkpoint_folder  # noqa: E402

__all__ = ["EngineRunner", "checkpoint_folder"]
