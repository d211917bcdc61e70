"""The InferenceRunner over the engine: request bodies in, OpenAI's response bodies out. The only adapter that imports the engine."""

from service.adapters.engine_runner.runner import EngineRunner, checkpoint_folder

__all__ = ["EngineRunner", "checkpoint_folder"]
