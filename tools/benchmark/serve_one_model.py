#!/usr/bin/env python3
"""One model in vLLM; called by serve.py. Needs vLLM, and of this package its plug-in.

Sequence i of every case begins with the same tokens, so that what a longer case has left in the
prefix cache need not be read again. A case first reads its prompts, which gives the rate of prompts
where none was cached, then decodes: the clock runs while every sequence gives a token in each step.
"""

import argparse
import json
import random
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_attnedit.files import write_output


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("json", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--cases", required=True)
    parser.add_argument("--full", default="")
    parser.add_argument("--full-gb", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--engine", default="{}")
    return parser.parse_args()


class Engine:
    """vLLM in this process, on random weights."""

    def __init__(self, directory: Path, more: dict[str, Any]) -> None:
        from vllm import LLM

        from megatron_attnedit.export.vllm import register

        register()  # vLLM's own search finds the plug-in in an installed package only
        own = json.loads((directory / "engine.json").read_text())
        config = json.loads((directory / "config.json").read_text())
        sizes = [1, 2, 4, 8, *range(16, 257, 8)]
        flags = {
            "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16",
            "max_model_len": 36864, "max_num_seqs": 256, "gpu_memory_utilization": 0.9,
            "enable_prefix_caching": True, "disable_log_stats": True,
            "compilation_config": {
                "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes,
            },
            **own, **more,
        }  # fmt: skip
        self.engine = LLM(model=str(directory), **flags).llm_engine
        self.config = self.engine.vllm_config
        self.cache = self.engine.engine_core.engine_core.scheduler.kv_cache_config
        self.vocab_size = config["vocab_size"]
        self._requests = 0

    def device(self) -> str:
        from vllm.platforms import current_platform

        return "CPU" if current_platform.is_cpu() else current_platform.get_device_name()

    def params(self, tokens: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)

    def add(self, prompts: list[list[int]], tokens: int) -> list[str]:
        """Queue them; names of the requests."""
        names = [str(self._requests + i) for i in range(len(prompts))]
        self._requests += len(prompts)
        for name, prompt in zip(names, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, self.params(tokens))
        return names

    def read(self, prompts: list[list[int]]) -> tuple[float, int]:
        """Read prompts; seconds, and how many of their tokens were cached."""
        self.add(prompts, 1)
        start, cached = time.perf_counter(), 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    cached += output.num_cached_tokens or 0
        return time.perf_counter() - start, cached

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds of a step in which every sequence gets a token.

        Raises:
            RuntimeError: the sequences do not fit into memory together.
        """
        names = self.add(prompts, 10**6)
        done = dict.fromkeys(names, 0)

        def step() -> None:
            for output in self.engine.step():
                done[output.request_id] = len(output.outputs[0].token_ids)

        while not all(done.values()):
            step()
        for _ in range(4):
            step()
        before, start = dict(done), time.perf_counter()
        while sum(done.values()) < sum(before.values()) + steps * len(names):
            step()
        seconds = time.perf_counter() - start
        grown = [done[name] - before[name] for name in names]
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        if max(grown) - min(grown) > 2:
            raise RuntimeError("some sequences waited for memory")
        return seconds / (sum(grown) / len(grown))

    def blocks(self, tokens: int) -> tuple[int, int]:
        """Blocks that a request of so many tokens holds, and what it reserves while it is read."""
        held = reserved = 0
        # Older versions do not tell: one step runs while the next is scheduled.
        batched = 2 * self.config.scheduler_config.max_num_batched_tokens
        in_flight = getattr(self.config, "max_in_flight_tokens", batched)
        for group in self.cache.kv_cache_groups:
            size = group.kv_cache_spec.block_size
            window = getattr(group.kv_cache_spec, "sliding_window", None)
            all_blocks = -(-tokens // size)
            held += all_blocks - (max(0, tokens - window + 1) // size if window else 0)
            read = -(-(window - 1 + in_flight) // size) + 1 if window else all_blocks
            reserved += min(read, all_blocks + 1)
        return held, reserved

    def sequences_that_fit(self, tokens: int, gigabytes: float) -> int:
        """How many of so many tokens fit together if the GPU had that much memory to use."""
        from vllm.platforms import current_platform

        pool, cache = self.bytes(), self.config.cache_config
        if cache.kv_cache_memory_bytes is None:
            usable = current_platform.get_device_total_memory() * cache.gpu_memory_utilization
            share = (pool - usable + gigabytes * 2**30) / pool
        else:
            share = gigabytes * 2**30 / pool
        held, reserved = self.blocks(tokens)
        blocks = self.cache.num_blocks * min(share, 1.0) - (reserved - held)
        count = min(int(blocks // held), self.config.scheduler_config.max_num_seqs)
        if count < 1:
            raise RuntimeError(f"{gigabytes} GB hold no sequence of {tokens} tokens")
        return count

    def bytes(self) -> int:
        """Of the cache; a block is a page for each layer of a group."""
        groups = self.cache.kv_cache_groups
        page = groups[0].kv_cache_spec.page_size_bytes
        return self.cache.num_blocks * page * max(len(group.layer_names) for group in groups)

    def capacity(self) -> dict[str, Any]:
        """What vLLM logs about its cache."""
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        requests = get_max_concurrency_for_kv_cache_config(self.config, self.cache)
        longest = self.config.model_config.max_model_len
        return {
            "max_model_len": longest,
            "requests": round(requests, 2),
            "tokens": int(requests * longest),
            "cache_bytes": self.bytes(),
            "groups": [len(group.layer_names) for group in self.cache.kv_cache_groups],
        }


def prompts(count: int, tokens: int, vocab_size: int) -> list[list[int]]:
    """Random tokens; a longer prompt begins with the shorter one of the same index."""
    top = max(2, vocab_size - 1)
    return [random.Random(i).choices(range(1, top), k=tokens) for i in range(count)]


def one_case(engine: Engine, sequences: int, tokens: int, steps: int) -> dict[str, Any]:
    """Prompts, then decoding."""
    given = prompts(sequences, tokens, engine.vocab_size)
    seconds, cached = engine.read(given)
    found: dict[str, Any] = {"sequences": sequences, "tokens": tokens, "cached": cached}
    if not cached:
        found["prefill_tokens_per_s"] = round(sequences * tokens / seconds)
    step = engine.decode(given, steps)
    return {
        **found,
        "decode_ms": round(step * 1e3, 3),
        "tokens_per_s": round(sequences / step),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    engine = Engine(args.directory, json.loads(args.engine))
    loaded = {name: version(name) for name in ("torch", "transformers")}
    found: dict[str, Any] = {
        **engine.capacity(), "device": engine.device(), "date": date.today().isoformat(),
        "vllm": _vllm_version(), **loaded,
        "max_num_batched_tokens": engine.config.scheduler_config.max_num_batched_tokens,
        "start_s": round(time.perf_counter() - start, 1), "cases": {}, "full": {},
    }  # fmt: skip
    save(args.json, args.name, found)
    for case in filter(None, args.cases.split(",")):
        sequences, tokens = map(int, case.split("x"))
        found["cases"][case] = one_case(engine, sequences, tokens, args.steps)
        save(args.json, args.name, found)
    for tokens in map(int, filter(None, args.full.split(","))):
        count = engine.sequences_that_fit(tokens + args.steps + 8, args.full_gb)
        found["full"][str(tokens)] = {
            **one_case(engine, count, tokens, args.steps),
            "gb": args.full_gb,
        }
        save(args.json, args.name, found)


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def save(file: Path, name: str, found: dict[str, Any]) -> None:
    """Put a model's results into the file, and show them."""
    every = json.loads(file.read_text()) if file.is_file() else {"models": {}}
    every["models"][name] = found
    write_output(file, json.dumps(every, indent=1) + "\n")
    print("RESULT", name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
