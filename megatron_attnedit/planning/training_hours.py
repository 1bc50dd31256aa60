"""GPU hours of both stages, from rates that were measured."""

from typing import NamedTuple

from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.planning.flops import stage1_flops, stage2_flops


class Rate(NamedTuple):
    """What one GPU reached.

    Attributes:
        tokens_per_second: At the shapes of ``case``.
        tflops: The same in ``planning/flops.py``'s operations, in 10^12 per second.
        case: Of a row in docs/data/performance.json.
    """

    tokens_per_second: int
    tflops: float
    case: str


DEVICE = "NVIDIA H200"
SOURCE = "docs/data/performance.json"
# One GPU, sequences of 4096 tokens, four micro-batches per step; by stage, without and with
# experts. Data parallelism keeps 97 to 99 % of it.
RATES = {
    (1, False): Rate(
        18084, 502.4, "qwen3 hidden 4096, 36 layers, MLA 512+64, sequence 4096, "
        "4 micro-batches per step",
    ),
    (2, False): Rate(
        9999, 532.5, "qwen3 hidden 4096, 36 layers, MLA 512+64, sequence 4096, "
        "4 micro-batches per step",
    ),
    (1, True): Rate(
        60337, 348.7, "qwen3_moe hidden 2048, 16 layers, MLA 256+64, sequence 4096, "
        "4 micro-batches per step, grouped experts",
    ),
    (2, True): Rate(
        33201, 334.6, "qwen3_moe hidden 2048, 16 layers, MLA 256+64, sequence 4096, "
        "4 micro-batches per step, grouped experts",
    ),
}  # fmt: skip


class Hours(NamedTuple):
    """Of one stage: GPU hours, and the tokens per second of one GPU that they come from."""

    gpu_hours: float
    tokens_per_second: float
    measured: Rate


def gpu_hours(teacher: HFConfig, stage: int, tokens: int, seq_length: int) -> Hours:
    """Hours of one GPU; as many GPUs share them, less what their communication takes.

    Args:
        teacher: Whose student is trained; its arithmetic scales the measured rate.
        stage: 1 or 2.
        tokens: Of the whole stage.
        seq_length: Tokens of a sample.
    """
    rate = RATES[stage, bool(teacher.num_experts)]
    flops = (stage1_flops if stage == 1 else stage2_flops)(teacher, seq_length)
    per_second = rate.tflops * 1e12 / flops
    return Hours(tokens / per_second / 3600, per_second, rate)
