"""Are the tokens that vLLM gives those that transformers would give? Of a real directory.

vLLM continues prompts greedily. transformers then reads every prompt with its continuation and is
asked at each token which one it would have taken. Where it is another one, the margin is what its
own lies above vLLM's, in logits: two kernels round differently, so a margin of a few steps of the
type at that size is a tie, and a larger one is a fault. Beside that transformers continues by
itself, and the tokens before the first difference are counted.

Run it as ``python -m tools.benchmark.serve_greedy``: as a script it would hide the package
``kernels``, which transformers looks for, behind this folder's file of that name.

Needs vLLM and transformers; on the device that is there, in the directory's own type.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TIE = 2.0  # steps of the type


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Hugging Face directory")
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a field text")
    parser.add_argument("--prompts", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=600, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="answered (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--engine", default="{}", help="more arguments of vllm.LLM, JSON")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--vllm-only", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    """The first tokens of the first documents that have so many."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    found: list[list[int]] = []
    with args.text.open(encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"])["input_ids"][: args.prompt_tokens]
            if len(ids) == args.prompt_tokens:
                found.append(ids)
            if len(found) == args.prompts:
                return found
    sys.exit(f"error: --text {args.text}: {len(found)} documents of {args.prompt_tokens} tokens")


def by_vllm(args: argparse.Namespace, prompts: list[list[int]]) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    from megatron_attnedit.export.vllm import register

    register()
    flags = {
        "dtype": args.dtype, "gpu_memory_utilization": 0.4, "max_num_batched_tokens": 2048,
        "max_model_len": args.prompt_tokens + args.tokens + 1, "enable_prefix_caching": False,
        **json.loads(args.engine),
    }  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    given = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = LLM(model=args.model, **flags).generate(given, params)
    return [list(output.outputs[0].token_ids) for output in outputs]


def compare(args: argparse.Namespace, prompts: list[list[int]], answers: list[list[int]]) -> Any:
    """Each prompt's agreement, margins and tokens before the first difference."""
    import torch

    from megatron_attnedit.export.hf import causal_lm_class

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dtype = getattr(torch, args.dtype)
    config = json.loads((Path(args.model) / "config.json").read_text())
    model = causal_lm_class(config).from_pretrained(
        args.model, dtype=dtype, trust_remote_code=False
    )
    model = model.eval().to(device)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer], device=device)
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
            own = model.generate(
                ids[:, : len(prompt)], max_new_tokens=len(answer), min_new_tokens=len(answer),
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )[0, len(prompt):].tolist()  # fmt: skip
        top = logits.max(-1).values
        margins = (top - logits.gather(1, ids[0, len(prompt) :, None])[:, 0]).tolist()
        steps = [
            margin / (2.0 ** math.floor(math.log2(abs(best))) * torch.finfo(dtype).eps)
            for margin, best in zip(margins, top.tolist(), strict=True)
        ]
        same = [a == b for a, b in zip(own, answer, strict=True)]
        first = same.index(False) if False in same else None
        rows.append({
            "same_when_forced": sum(margin == 0 for margin in margins),
            "ties": sum(0 < step <= TIE for step in steps),
            "faults": sum(step > TIE for step in steps),
            "largest_margin": max(margins),
            "largest_margin_in_steps": max(steps),
            "before_first_difference": len(answer) if first is None else first,
            "margin_of_first_difference": None if first is None else margins[first],
        })  # fmt: skip
    return rows


def main() -> None:
    args = parse_args()
    if args.vllm_only:
        file = json.loads(args.vllm_only.read_text())
        file["answers"] = by_vllm(args, file["prompts"])
        args.vllm_only.write_text(json.dumps(file))
        return
    prompts = prompts_of(args)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.json"
        file.write_text(json.dumps({"prompts": prompts}))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        command = [sys.executable, "-m", "tools.benchmark.serve_greedy", *sys.argv[1:]]
        command += ["--vllm-only", str(file)]
        if subprocess.run(command, env=environment).returncode:
            sys.exit(f"error: {args.model}: vLLM failed; its message is above")
        answers = json.loads(file.read_text())["answers"]
    rows = compare(args, prompts, answers)
    total = args.tokens * len(rows)
    result = {
        "model": args.model, "dtype": args.dtype, "prompts": len(rows), "tokens": total,
        "same_when_forced": sum(row["same_when_forced"] for row in rows) / total,
        "ties": sum(row["ties"] for row in rows), "faults": sum(row["faults"] for row in rows),
        "before_first_difference": sum(row["before_first_difference"] for row in rows) / total,
        "largest_margin": max(row["largest_margin"] for row in rows), "rows": rows,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{total} tokens: {result['same_when_forced']:.1%} are transformers' own, "
        f"{result['ties']} ties, {result['faults']} faults, largest margin "
        f"{result['largest_margin']:.3f}; {result['before_first_difference']:.1%} come before a "
        "continuation's first difference"
    )
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
