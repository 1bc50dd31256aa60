"""What a run may be told, with Megatron's names, and what does not go together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_attnedit.core_attention.backends import ATTENTION_BACKENDS
from megatron_attnedit.distill.divergences import DIVERGENCES
from megatron_attnedit.distill.layerwise import NORMALISATIONS
from megatron_attnedit.errors import UserError
from megatron_attnedit.files import check_output_folder
from megatron_attnedit.models.parallel_layout import ParallelConfig, num_microbatches
from megatron_attnedit.models.transformer_engine import TRANSFORMER_IMPLS
from megatron_attnedit.training.data_options import DataOptions
from megatron_attnedit.training.options import check_options, flag_name, option
from megatron_attnedit.training.precision_options import PrecisionOptions, ShareInFp8
from megatron_attnedit.training.random_state import LARGEST_SEED
from megatron_attnedit.training.task_options import TaskOptions

POLICIES = ("stop", "skip")  # for bad iterations
# Megatron keeps the order of a run's samples in memory, 16 bytes and more for each.
MOST_SAMPLES = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Recipe(TaskOptions, DataOptions, PrecisionOptions):
    """What both stages have in common. Flags are the field names with dashes."""

    number = 0  # of the stage

    teacher: str = option(
        "", "teacher: Hugging Face directory, or imported Megatron checkpoint", is_path=True
    )
    load: str = option(
        "", "student to start from: checkpoint, exported model or edited weights", is_path=True
    )
    save: str = option(
        "", "folder for checkpoints, metrics.jsonl and TensorBoard; resumed from", is_path=True
    )
    seq_length: int = option(4096, "tokens of a sample", minimum=1)
    micro_batch_size: int = option(1, "samples that one process computes at a time", minimum=1)
    global_batch_size: int = option(32, "samples of an iteration, over all processes", minimum=1)
    train_iters: int = option(1000, "iterations (optimizer updates)", minimum=1)

    lr: float = option(1e-3, "largest learning rate", above=0)
    min_lr: float = option(1e-5, "last learning rate", minimum=0)
    lr_decay_style: str = option(
        "cosine",
        "shape of the decay; WSD: warm-up, stable, decay",
        ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_wsd_decay_iters: int = option(0, "with WSD, last iterations: those of the decay", minimum=0)
    lr_wsd_decay_style: str = option(
        "minus_sqrt", "shape of WSD's decay", ("exponential", "linear", "cosine", "minus_sqrt")
    )
    lr_warmup_iters: int = option(0, "iterations of linear warm-up", minimum=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", minimum=0)
    adam_beta1: float = option(0.9, "AdamW's first moment", minimum=0, below=1)
    adam_beta2: float = option(0.95, "AdamW's second moment", minimum=0, below=1)
    adam_eps: float = option(1e-8, "AdamW's epsilon", above=0, maximum=1)
    clip_grad: float = option(1.0, "largest norm of the gradient; 0: no clipping", minimum=0)
    bf16: bool = option(False, "bfloat16 parameters with float32 master weights")
    seed: int = option(1234, "of data order", maximum=LARGEST_SEED, minimum=0)

    tensor_model_parallel_size: int = option(1, "processes that share each layer", minimum=1)
    sequence_parallel: bool = option(False, "cut norms over tensor-parallel processes, too")
    pipeline_model_parallel_size: int = option(1, "stages that the layers are cut into", minimum=1)
    num_virtual_stages_per_pipeline_rank: int = option(
        1, "model chunks on each process; above 1: interleaved pipeline", minimum=1
    )
    pipeline_model_parallel_layout: str = option(
        "", "layers of each stage, for example Et|ttt|tttL (E embedding, t layer, L loss)"
    )
    context_parallel_size: int = option(1, "processes that share each sequence", minimum=1)
    expert_model_parallel_size: int = option(1, "processes that share the experts", minimum=1)
    expert_tensor_parallel_size: int = option(1, "processes that share each expert", minimum=1)
    gradient_accumulation_fusion: bool = option(True, "weight gradients right into main gradients")
    moe_grouped_gemm: bool = option(False, "all experts in one grouped matmul; needs --bf16")
    transformer_impl: str = option("local", "whose norms, MLPs and experts", TRANSFORMER_IMPLS)
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
    attention_backend: str = option("auto", "attention kernel", ("auto", *ATTENTION_BACKENDS))
    enable_cuda_graph: bool = option(
        False,
        "capture as CUDA graphs and replay, in stage 1 a micro-batch, in stage 2 the teacher and "
        "(without overlap and --recompute full) the student: NVIDIA; no context parallelism, no "
        "virtual stages; experts only if grouped and without tensor or expert parallelism",
    )

    log_interval: int = option(10, "iterations between log lines", minimum=1)
    eval_interval: int = option(
        100, "iterations between validations; also runs first and last", minimum=1
    )
    eval_iters: int = option(10, "global batches of a validation", minimum=1)
    wandb_project: str = option("", "Weights & Biases project to log to, besides TensorBoard")
    wandb_exp_name: str = option("", "name of the run there; default: that of the folder --save")

    save_interval: int = option(
        500, "iterations between checkpoints; the last one is always saved", minimum=1
    )
    async_save: bool | None = option(
        None, "write checkpoints in the background; not given: on accelerators, not on a CPU"
    )
    keep_last: int = option(0, "newest checkpoints that stay; 0: all", minimum=0)
    keep_every: int = option(
        0,
        "with --keep-last: those of iterations that are a multiple of it stay, too; 0: none",
        minimum=0,
    )

    exit_duration_in_mins: float = option(
        0.0, "minutes after which to save and exit with code 75; 0: no limit", minimum=0
    )
    exit_interval: int = option(
        0,
        "save and exit with code 75 after an iteration that is a multiple of it; 0: never",
        minimum=0,
    )
    distributed_timeout_minutes: int = option(
        10, "minutes until a process stops waiting for another one", minimum=1, maximum=43200
    )
    bad_iterations: str = option(
        "stop", "what to do when loss or gradients are not finite, or a loss jumps", POLICIES
    )
    max_skipped_iterations: int = option(
        10, "iterations that --bad-iterations skip may skip", minimum=0
    )
    loss_spike_factor: float = option(
        0.0, "a loss above so many times its running mean is bad; 0: none is", minimum=0
    )

    def __post_init__(self) -> None:
        for name in ("teacher", "load", "save", "train_data_path"):
            if getattr(self, name) in ("", []):
                raise UserError(f"--{name.replace('_', '-')} is required")
        check_options(self)
        self._check_samples()
        self.check_tasks()
        self.check_precision(bf16=self.bf16, transformer_impl=self.transformer_impl)
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
        if self.lr_warmup_iters >= self.train_iters:
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
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr}: expected from 0 to --lr {self.lr}")

    def _check_samples(self) -> None:
        counts = {"train_iters": self.train_iters}
        if self.valid_data_path:
            counts["eval_iters"] = self.eval_iters
        for name, iterations in counts.items():
            samples = iterations * self.global_batch_size
            if samples > MOST_SAMPLES:
                raise UserError(
                    f"{flag_name(name)} {iterations} times --global-batch-size "
                    f"{self.global_batch_size}: {samples:,} samples, more than the "
                    f"{MOST_SAMPLES:,} whose order is kept in memory"
                )

    def check_folders(self) -> None:
        """Find out before anything is loaded whether the folders that a run writes can be made.

        Raises:
            UserError: names the flag and what is in the way.
        """
        check_output_folder(Path(self.save), "--save")
        if self.data_cache_path:
            check_output_folder(Path(self.data_cache_path), "--data-cache-path")

    @property
    def own_copies(self) -> bool:
        """Has the student modules of its own, also where they are as the teacher's?"""
        return False

    @property
    def recomputation(self) -> str:
        """What backward computes again: ``none``, ``selective`` or ``full``."""
        return "none"

    def workload(self) -> dict[str, Any]:
        """Fields of ``planning.activations.Workload`` that are this stage's own."""
        return {"fp8_layers": self.frozen_precision_layers if self.in_fp8 else ""}

    def parallel(self) -> ParallelConfig:
        """The layout.

        Raises:
            UserError: its sizes do not go together.
        """
        return ParallelConfig.from_fields(vars(self))

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Micro-batches of one process in an iteration.

        Raises:
            UserError: the global batch does not divide evenly.
        """
        return num_microbatches(self.global_batch_size, self.micro_batch_size, data_parallel_size)


@dataclass(frozen=True, kw_only=True)
class Stage1Recipe(Recipe):
    """Layer-wise distillation."""

    number = 1

    normalisation: str = option(
        "layer", "error divided by the layer's or by each token's energy", NORMALISATIONS
    )
    scheduled_sampling_start: float = option(
        0.0,
        "probability in the first iteration that a layer gets the student's own hidden states",
        minimum=0,
        maximum=1,
    )
    scheduled_sampling_end: float = option(
        0.0,
        "the same in the last iteration, linear between; both 0: layers get the teacher's only",
        minimum=0,
        maximum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enable_cuda_graph and self.overlap_grad_reduce:
            raise UserError(
                "--enable-cuda-graph does not go with --overlap-grad-reduce: in a replay nothing "
                "tells when a gradient is ready"
            )

    @property
    def runs_student(self) -> bool:
        """Does any layer receive the student's own hidden states?"""
        return max(self.scheduled_sampling_start, self.scheduled_sampling_end) > 0

    def workload(self) -> dict[str, Any]:
        return {**super().workload(), "runs_student": self.runs_student}


@dataclass(frozen=True, kw_only=True)
class Stage2Recipe(ShareInFp8, Recipe):
    """Model-level distillation."""

    number = 2

    lr: float = option(1e-4, "largest learning rate", above=0)
    kl: str = option("forward", "divergence: forward is KL(teacher || student)", tuple(DIVERGENCES))
    temperature: float = option(
        1.0, "divides the logits of both models", minimum=0.01, maximum=1000
    )
    feature_matching_weight: float = option(
        0.0, "weight of 1 - cosine of hidden states against the KL loss; 0: off", minimum=0
    )
    kl_chunk_tokens: int = option(1024, "tokens whose logits live at a time", minimum=1)
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
        if self.enable_cuda_graph and self.feature_matching_weight:
            raise UserError(
                "--enable-cuda-graph does not go with --feature-matching-weight: a replay hands "
                "out nothing between the teacher's layers"
            )
        if self.recompute == "full" and self.feature_matching_weight:
            raise UserError(
                "--recompute full does not go with --feature-matching-weight: its targets are gone "
                "when a layer runs again; use --recompute selective"
            )
        self.check_share(self.valid_data_path, self.feature_matching_weight)

    @property
    def own_copies(self) -> bool:
        return self.trainable == "all"

    @property
    def recomputation(self) -> str:
        return self.recompute

    def workload(self) -> dict[str, Any]:
        return {
            **super().workload(),
            "trainable": self.trainable,
            "recompute": self.recompute,
            "feature_matching": self.feature_matching_weight > 0,
            "kl_chunk_tokens": self.kl_chunk_tokens,
        }
