"""A run is one recipe: YAML with Megatron's flag names, overridden by the command line."""

import argparse
import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_attnedit.distill.divergences import DIVERGENCES
from megatron_attnedit.distill.layerwise import NORMALISATIONS
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.grid import num_microbatches

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
        "cosine", "shape of the decay", ("constant", "linear", "cosine", "inverse-square-root")
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
    attention_backend: str = option(
        "auto", "attention kernel", ("auto", "sdpa", "reference", "npu_fusion")
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
        if not 0 <= self.lr_warmup_iters < self.train_iters:
            raise UserError(
                f"--lr-warmup-iters {self.lr_warmup_iters}: expected from 0 to less than "
                f"--train-iters {self.train_iters}"
            )
        if not 0 <= self.min_lr <= self.lr:
            raise UserError(f"--min-lr {self.min_lr}: expected from 0 to --lr {self.lr}")

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
    record: bool = option(
        False, "record a micro-batch once and replay it: one GPU per replica, dense models"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.record and self.overlap_grad_reduce:
            raise UserError(
                "--record does not go with --overlap-grad-reduce: in a replay nothing tells when a "
                "gradient is ready"
            )


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
        if self.recompute == "full" and self.feature_matching_weight:
            raise UserError(
                "--recompute full does not go with --feature-matching-weight: its targets are gone "
                "when a layer runs again; use --recompute selective"
            )


def _field_types(cls: type[Recipe]) -> dict[str, Any]:
    kinds = typing.get_type_hints(cls)
    return {name: bool if kind == (bool | None) else kind for name, kind in kinds.items()}


def _checked(name: str, value: Any, kind: Any, where: str) -> Any:
    """A YAML value of the field's type; numbers such as ``1e-4`` come as text from YAML."""
    wanted = typing.get_origin(kind) or kind
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if wanted is list and isinstance(value, list | str):
        items = value if isinstance(value, list) else [value]
        return [str(item) for item in items]
    if isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise UserError(
        f"{where}: {name} is {value!r}, expected {getattr(wanted, '__name__', wanted)}"
    )


def read_recipe_file(cls: type[Recipe], file: str | Path) -> dict[str, Any]:
    """Keys and values of a YAML recipe.

    Raises:
        UserError: no such file, not YAML, an unknown key or a value of another type.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values")
    kinds = _field_types(cls)
    for key in content:
        if key not in kinds:
            raise UserError(f"{path}: unknown key {key!r}; known keys: {', '.join(sorted(kinds))}")
    defaults = {item.name: item.default for item in dataclasses.fields(cls)}
    return {
        key: _checked(key, value, kinds[key], str(path))
        for key, value in content.items()
        if value is not None or defaults[key] is not None
    }


def parser_for(cls: type[Recipe], description: str) -> argparse.ArgumentParser:
    """One flag per field, with unit and default."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="With --dry-run nothing is trained: grid, schedule and memory are checked and shown "
        "on any machine; --dry-run --help lists its flags.",
    )
    parser.add_argument("--recipe", help="YAML file; flags given here override it")
    kinds = _field_types(cls)
    for item in dataclasses.fields(cls):
        is_list = item.default_factory is not dataclasses.MISSING
        default = "none" if is_list or item.default in ("", None) else item.default
        kwargs: dict[str, Any] = {
            "help": f"{item.metadata['help']} (default: {default})",
            "default": argparse.SUPPRESS,
        }
        if kinds[item.name] is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif is_list:
            kwargs.update(nargs="+", metavar="ARG")
        else:
            kwargs.update(type=kinds[item.name], metavar=kinds[item.name].__name__.upper())
        parser.add_argument(f"--{item.name.replace('_', '-')}", **kwargs)
    return parser


def parse_recipe(cls: type[Recipe], description: str, argv: list[str] | None = None) -> Any:
    """The run's recipe from ``--recipe`` and flags.

    Raises:
        UserError: see ``read_recipe_file`` and the recipe's own checks.
    """
    given = vars(parser_for(cls, description).parse_args(argv))
    file = given.pop("recipe", None)
    values = read_recipe_file(cls, file) if file else {}
    return cls(**{**values, **given})


def to_yaml(recipe: Recipe) -> str:
    """The final values, as written beside every checkpoint."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)


