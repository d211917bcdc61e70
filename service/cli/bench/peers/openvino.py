"""OpenVINO GenAI: continuous batching over paged f32 KV with prefix caching, all prompts at once. Options: max_num_seqs,
max_num_batched_tokens, prompt_lookup (drafts a step)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.cli.bench.peers.wire import Answers, Job, Prompt, Stopwatch, cut, serve

_CACHE_GIB = 4
_IR = "openvino_model.xml"


def convert(job: Job) -> Path:
    """The checkpoint as an OpenVINO model with float32 weights, made once."""
    target = Path(job.scratch)
    if not (target / _IR).exists():
        from optimum.intel import OVModelForCausalLM
        from transformers import AutoTokenizer

        partial = target.with_name(f"{target.name}.part")
        model = OVModelForCausalLM.from_pretrained(job.model, export=True, load_in_8bit=False, compile=False, dtype="float32")
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(job.model).save_pretrained(partial)
        partial.rename(target)
    return target


def run(job: Job, watch: Stopwatch) -> Answers:
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = _CACHE_GIB
    scheduler.max_num_seqs = job.options["max_num_seqs"]
    scheduler.max_num_batched_tokens = job.options["max_num_batched_tokens"]
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = True
    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "INFERENCE_NUM_THREADS": job.threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
    drafts = job.options.get("prompt_lookup")
    if drafts:
        properties["prompt_lookup"] = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(convert(job)), scheduler, "CPU", properties)
    inputs = [openvino.Tensor(np.array([prompt.tokens], np.int64)) for prompt in job.prompts]
    watch.start()
    handles = [
        pipeline.add_request(number, ids, _settings(openvino_genai, prompt, job, drafts))
        for number, (prompt, ids) in enumerate(zip(job.prompts, inputs, strict=True))
    ]
    steps = 0
    while pipeline.has_non_finished_requests():
        pipeline.step()
        steps += 1
        if steps % 16 == 0:
            watch.done(sum(handle.get_status() == openvino_genai.GenerationStatus.FINISHED for handle in handles))
    answers = {}
    for prompt, handle in zip(job.prompts, handles, strict=True):
        (output,) = handle.read_all()
        answers[prompt.id] = cut(list(output.generated_ids), prompt, job.ends)
    return answers


def _settings(genai: Any, prompt: Prompt, job: Job, drafts: int | None) -> Any:
    settings = genai.GenerationConfig()
    settings.max_new_tokens = prompt.max_tokens
    settings.do_sample = False
    settings.apply_chat_template = False
    settings.stop_token_ids = set(job.ends)
    settings.eos_token_id = job.ends[0]
    if drafts:
        settings.num_assistant_tokens = drafts
        settings.max_ngram_size = 3
    return settings


if __name__ == "__main__":
    serve(run)
