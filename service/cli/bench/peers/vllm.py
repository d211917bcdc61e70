"""vLLM on a CPU: `LLM.generate` over all prompts, compiled, prefix caching on. Options: max_num_seqs, ngram (drafts a step)."""

from __future__ import annotations

import os
from typing import Any

from service.cli.bench.peers.wire import Answers, Job, Stopwatch, cut, serve

_CACHE_GIB = 4
_TOKENS_A_STEP = 2048


def run(job: Job, watch: Stopwatch) -> Answers:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one process: its peak memory is the engine's
        VLLM_CPU_KVCACHE_SPACE=str(_CACHE_GIB),
        VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, sorted(os.sched_getaffinity(0))[: job.threads])),
        VLLM_CPU_NUM_OF_RESERVED_CPU="0",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CACHE_ROOT=job.scratch,
        VLLM_LOGGING_LEVEL="WARNING",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM, SamplingParams

    longest = max(len(prompt.tokens) + prompt.max_tokens for prompt in job.prompts)
    settings: dict[str, Any] = {
        "model": job.model,
        "dtype": "float32",
        "max_num_seqs": job.options["max_num_seqs"],
        "max_num_batched_tokens": max(_TOKENS_A_STEP, job.options["max_num_seqs"]),
        "max_model_len": longest + 1,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "disable_log_stats": True,
    }
    if drafts := job.options.get("ngram"):
        settings["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": drafts,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    engine = LLM(**settings)
    parameters = [
        SamplingParams(temperature=0.0, max_tokens=prompt.max_tokens, stop_token_ids=job.ends, detokenize=False) for prompt in job.prompts
    ]
    prompts = [{"prompt_token_ids": prompt.tokens} for prompt in job.prompts]
    watch.start()
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    return {
        prompt.id: cut(list(output.outputs[0].token_ids), prompt, job.ends) for prompt, output in zip(job.prompts, outputs, strict=True)
    }


if __name__ == "__main__":
    serve(run)
