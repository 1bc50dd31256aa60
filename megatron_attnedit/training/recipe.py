"""What a run may be told, with Megatron's names, and what does not go together."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_attnedit.distill.divergences import DIVERGENCES
from megatron_attnedit.distill.layerwise import NORMALISATIONS
from megatron_attnedit.errors import UserError
from megatron_attnedit.files import check_output_folder
from megatron_attnedit.models.grid import num_microbatches
from megatron_attnedit.training.random_state import check_seed

POLICIES = ("stop", "skip")  # for bad iterations
COUNTS = (
    "keep_last keep_every exit_duration_in_mins exit_interval max_skipped_iterations "
    "loss_spike_factor max_epochs"
)


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A recipe field: its default, its help text with the unit, and what it may be."""
    metadata = {"help": text, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What both stages have in common. Flags are the field names with dashes."""

    teacher: str = option("", "teacher: Hugging Face directory, or imported Megatron checkpoint")
    load: str = option("", "student to start from: checkpoint, exported model or edited weights")
    save: str = option("", "folder for checkpoints, metrics.jsonl and TensorBoard; resumed from")
    train_data_path: list[str] = option(
        [], "prefix of .bin/.idx files, or weight prefix weight prefix ..."
    )
    valid_data_path: list[str] = option([], "the same for validation; empty: no validation")
    data_cache_path: str = option("", "folder for data indices; default: data-cache inside --save")
    eod_mask_loss: bool = option(False, "leave end-of-document tokens out of the loss")

    seq_length: int = option(4096, "tokens of a sample")
    micro_batch_size: int = option(1, "samples that one process computes at a time")
    global_batch_size: int = option(32, "samples of an iteration, over all processes")
    train_iters: int = option(1000, "iterations (optimizer updates)")

    lr: float = option(1e-3, "largest learning rate")
    min_lr: float = option(1e-5, "last learning rate")
    lr_decay_style: str = option(
        "cosine",
        "shape of the decay; WSD: warm-up, stable, decay",
        ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_wsd_decay_iters: int = option(0, "with WSD, last iterations: those of the decay")
    lr_wsd_decay_style: str = option(
        "minus_sqrt", "shape of WSD's decay", ("exponential", "linear", "cosine", "minus_sqrt")
    )
    lr_warmup_iters: int = option(0, "iterations of linear warm-up")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    adam_beta1: float = option(0.9, "AdamW's first moment")
    adam_beta2: float = option(0.95, "AdamW's second moment")
    adam_eps: float = option(1e-8, "AdamW's epsilon")
    clip_grad: float = option(1.0, "largest norm of the gradient; 0: no clipping")
    bf16: bool = option(False, "bfloat16 parameters with float32 master weights")
    seed: int = option(1234, "of data order")

    tensor_model_parallel_size: int = option(1, "processes that share each layer")
    sequence_parallel: bool = option(False, "cut norms over tensor-parallel processes, too")
    pipeline_model_parallel_size: int = option(1, "stages that the layers are cut into")
    num_virtual_stages_per_pipeline_rank: int = option(
        1, "pieces of the model on each process; above 1: interleaved pipeline"
    )
    pipeline_model_parallel_layout: str = option(
        "", "layers of each stage, for example Et|ttt|tttL (E embedding, t layer, L loss)"
    )
    context_parallel_size: int = option(1, "processes that share each sequence")
    expert_model_parallel_size: int = option(1, "processes that share the experts")
    expert_tensor_parallel_size: int = option(1, "processes that share each expert")
    gradient_accumulation_fusion: bool = option(
        True, "weight gradients straight into main gradients"
    )
    moe_grouped_gemm: bool = option(False, "all experts in one grouped matmul; needs --bf16")
    use_distributed_optimizer: bool = option(
        False, "cut optimizer state over data-parallel processes"
    )
    overlap_grad_reduce: bool = option(
        False, "reduce gradients while the last micro-batch is still computed"
    )
    overlap_param_gather: bool = option(
        False, "gather updated weights while the next iteration has begun"
    )
    optimizer_cpu_offload: bool = option(
        False, "master weights, moments and update on the host; needs --use-distributed-optimizer"
    )
    attention_backend: str = option(
        "auto", "attention kernel", ("auto", "sdpa", "flex", "te", "reference", "npu_fusion")
    )
    record: bool = option(
        False,
        "record once and replay, in stage 1 a micro-batch, in stage 2 the teacher: NVIDIA; no "
        "context parallelism, no virtual stages; experts only if grouped and without tensor or "
        "expert parallelism",
    )

    log_interval: int = option(10, "iterations between log lines")
    eval_interval: int = option(100, "iterations between validations; also runs first and last")
    eval_iters: int = option(10, "global batches of a validation")
    wandb_project: str = option("", "Weights & Biases project to log to, besides TensorBoard")
    wandb_exp_name: str = option("", "name of the run there; default: that of the folder --save")

    save_interval: int = option(500, "iterations between checkpoints; the last one is always saved")
    async_save: bool | None = option(
        None, "write checkpoints behind the training; not given: on accelerators, not on a CPU"
    )
    keep_last: int = option(0, "newest checkpoints that stay; 0: all")
    keep_every: int = option(
        0, "with --keep-last: those of iterations that are a multiple of it stay, too; 0: none"
    )

    exit_duration_in_mins: float = option(
        0.0, "minutes after which to save and exit with code 75; 0: no limit"
    )
    exit_interval: int = option(
        0, "save and exit with code 75 after an iteration that is a multiple of it; 0: never"
    )
    distributed_timeout_minutes: int = option(
        10, "minutes until a process stops waiting for another one"
    )
    bad_iterations: str = option(
        "stop", "what to do when loss or gradients are not finite, or a loss jumps", POLICIES
    )
    max_skipped_iterations: int = option(10, "iterations that --bad-iterations skip may skip")
    loss_spike_factor: float = option(
        0.0, "a loss above so many times its running mean is bad; 0: none is"
    )
    max_epochs: float = option(0.0, "times that the training data may be read; 0: any number")

    def __post_init__(self) -> None:
        for name in ("teacher", "load", "save", "train_data_path"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} is required")
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            choices = item.metadata["choices"]
            if choices and value not in choices:
                flag = item.name.replace("_", "-")
                raise UserError(f"--{flag} {value!r}: expected one of {', '.join(choices)}")
        positive = "seq_length micro_batch_size global_batch_size train_iters lr"
        intervals = " log_interval eval_interval eval_iters save_interval"
        intervals += " distributed_timeout_minutes"
        for name in (positive + intervals).split():
            if not getattr(self, name) > 0:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)}: expected a positive number")
        for name in COUNTS.split():
            if getattr(self, name) < 0:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)}: expected 0 or a positive number")
        check_seed(self.seed)
        if self.keep_every and not self.keep_last:
            raise UserError(f"--keep-every {self.keep_every}: all stay without --keep-last")
        if 0 < self.loss_spike_factor <= 1:
            raise UserError(f"--loss-spike-factor {self.loss_spike_factor}: expected more than 1")
        if self.moe_grouped_gemm and not self.bf16:
            raise UserError("--moe-grouped-gemm needs --bf16: mcore's grouped experts are bfloat16")
        if self.overlap_param_gather and not (
            self.overlap_grad_reduce and self.use_distributed_optimizer
        ):
            raise UserError(
                "--overlap-param-gather needs --overlap-grad-reduce and --use-distributed-optimizer"
            )
        if self.optimizer_cpu_offload and not (self.bf16 and self.use_distributed_optimizer):
            raise UserError(
                "--optimizer-cpu-offload needs --bf16 and --use-distributed-optimizer: mcore's "
                "optimizer on the host is of that kind"
            )
        if not 0 <= self.lr_warmup_iters < self.train_iters:
            raise UserError(
                f"--lr-warmup-iters {self.lr_warmup_iters}: expected from 0 to less than "
                f"--train-iters {self.train_iters}"
            )
        stable = self.train_iters - self.lr_warmup_iters
        if self.lr_decay_style == "WSD" and not 0 < self.lr_wsd_decay_iters <= stable:
            raise UserError(
                f"--lr-wsd-decay-iters {self.lr_wsd_decay_iters}: expected from 1 to the "
                f"{stable} iterations after the warm-up"
            )
        if self.lr_decay_style != "WSD" and self.lr_wsd_decay_iters:
            raise UserError(
                f"--lr-wsd-decay-iters {self.lr_wsd_decay_iters}: needs --lr-decay-style WSD"
            )
        if not 0 <= self.min_lr <= self.lr:
            raise UserError(f"--min-lr {self.min_lr}: expected from 0 to --lr {self.lr}")

    def check_folders(self) -> None:
        """Find out before anything is loaded whether the folders that a run writes can be made.

        Raises:
            UserError: names the flag and what is in the way.
        """
        check_output_folder(Path(self.save), "--save")
        if self.data_cache_path:
            check_output_folder(Path(self.data_cache_path), "--data-cache-path")

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Micro-batches of one process in an iteration.

        Raises:
            UserError: the global batch does not divide evenly.
        """
        return num_microbatches(
            self.global_batch_size, self.micro_batch_size, data_parallel_size
        )


@dataclass(frozen=True, kw_only=True)
class Stage1Recipe(Recipe):
    """Layer-wise distillation."""

    normalisation: str = option(
        "layer", "error divided by the layer's or by each token's energy", NORMALISATIONS
    )
    student_input_start: float = option(
        0.0, "probability in the first iteration that a layer gets the student's own hidden states"
    )
    student_input_end: float = option(
        0.0, "the same in the last iteration, linear between; both 0: layers get the teacher's only"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("student_input_start", "student_input_end"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {value}: expected a probability, from 0 to 1")
        if self.record and self.overlap_grad_reduce:
            raise UserError(
                "--record does not go with --overlap-grad-reduce: in a replay nothing tells when a "
                "gradient is ready"
            )

    @property
    def runs_student(self) -> bool:
        """Does any layer receive the student's own hidden states?"""
        return max(self.student_input_start, self.student_input_end) > 0


@dataclass(frozen=True, kw_only=True)
class Stage2Recipe(Recipe):
    """Model-level distillation."""

    lr: float = option(1e-4, "largest learning rate")
    kl: str = option("forward", "divergence: forward is KL(teacher || student)", tuple(DIVERGENCES))
    temperature: float = option(1.0, "divides the logits of both models")
    feature_matching_weight: float = option(
        0.0, "weight of 1 - cosine of hidden states against the KL loss; 0: off"
    )
    kl_chunk_tokens: int = option(1024, "tokens whose logits live at a time")
    recompute: str = option(
        "none",
        "what backward computes again to save memory: core attention, or whole layers",
        ("none", "selective", "full"),
    )
    trainable: str = option(
        "attention", "what trains: edited attentions, or a full copy", ("attention", "all")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.record and self.feature_matching_weight:
            raise UserError(
                "--record does not go with --feature-matching-weight: a replay hands out nothing "
                "between the teacher's layers"
            )
        if self.recompute == "full" and self.feature_matching_weight:
            raise UserError(
                "--recompute full does not go with --feature-matching-weight: its targets are gone "
                "when a layer runs again; use --recompute selective"
            )
