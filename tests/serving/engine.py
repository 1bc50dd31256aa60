"""One model in vLLM; runs in the environment that has vLLM, and imports nothing of this package.

Usage: python engine.py REQUEST.json ANSWER.json. The request: ``model``, ``prompt`` (token ids),
``max_tokens`` and ``settings`` of ``vllm.LLM``. The answer: log-probabilities of the prompt's
tokens but the first, greedy tokens, the model's class, the tokens of a block of the cache, and what
it held in every step.
"""

import json
import os
import sys

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2",
)  # fmt: skip


def held(core):
    """Tokens computed of the one request, and bytes of the blocks that it holds."""
    request = next(iter(core.scheduler.requests.values()))
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    blocks = core.scheduler.kv_cache_manager.get_blocks(request.request_id).blocks
    used = [sum(not block.is_null for block in of_group) for of_group in blocks]
    sizes = [group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in groups]
    return request.num_computed_tokens, sum(n * size for n, size in zip(used, sizes, strict=True))


def main():
    with open(sys.argv[1]) as file:
        request = json.load(file)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=request["model"], dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
        max_num_seqs=2, kv_cache_memory_bytes=64 * 2**20, enable_prefix_caching=False,
        **request["settings"],
    )  # fmt: skip
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    sampling = SamplingParams(
        temperature=0, max_tokens=request["max_tokens"], prompt_logprobs=0, ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    prompt = request["prompt"]
    engine.add_request("0", {"prompt_token_ids": prompt}, sampling)
    steps, outputs = [], []
    while engine.has_unfinished_requests():
        outputs += engine.step()
        if core.scheduler.requests:
            steps.append(held(core))
    output = outputs[-1]
    seen = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    answer = {
        "log_probabilities": [found[token].logprob for found, token in seen],
        "tokens": list(output.outputs[0].token_ids),
        "class": llm.apply_model(type)[0].__name__,  # a function that other processes find
        "held": steps,
        "block_size": core.scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
    }
    with open(sys.argv[2], "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
