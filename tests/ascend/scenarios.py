"""What is run on a CPU and on a stand-in NPU, and compared. Results are plain or on the CPU."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.core_attention.backends import ATTENTION_BACKENDS
from megatron_attnedit.device import bootstrap, kernels
from megatron_attnedit.distill.layerwise import LayerwiseDistillation
from megatron_attnedit.distill.model_level import ModelLevelConfig, ModelLevelDistillation
from megatron_attnedit.models.config import transformer_config
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.training.edit import EditConfig, edit
from megatron_attnedit.training.loop import train as training_loop
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.run import prepare
from megatron_attnedit.training.setup import (
    Teacher,
    load_teacher,
    start_processes,
    stop_processes,
)
from megatron_attnedit.training.student import Student, find_student
from tests.support.inputs import STUDENTS
from tests.support.inputs import recipe as small_recipe
from tests.support.models import tokens as random_tokens

OPERATORS = (
    *("npu_rms_norm", "npu_rms_norm_backward", "npu_rotary_mul", "npu_rotary_mul_backward"),
    *("npu_swiglu", "npu_swiglu_backward", "npu_grouped_matmul"),
    *("npu_fusion_attention", "npu_fusion_attention_grad"),
)
# Head size, value's, query heads, key heads, queries, keys, window.
ATTENTIONS = {
    "full": (64, 64, 4, 4, 40, 40, None),
    "grouped": (64, 64, 8, 2, 40, 40, None),
    "window": (64, 64, 4, 2, 40, 40, (7, 0)),
    "window of one": (64, 64, 4, 2, 40, 40, (0, 0)),
    "window wider than the sequence": (64, 64, 4, 2, 40, 40, (63, 0)),
    "mla": (192, 128, 4, 4, 40, 40, None),
    "fewer queries": (64, 64, 4, 2, 16, 40, None),
    "fewer queries, window": (64, 64, 4, 2, 16, 40, (7, 0)),
}
WITH_SINKS = ("grouped", "window", "fewer queries, window")


@contextlib.contextmanager
def true_numbers() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What torch_npu's operators were called with; none on a CPU."""
    torch_npu = sys.modules.get("torch_npu")
    if torch_npu is None or hasattr(torch_npu, "IN_PYTHON"):
        yield []
        return
    from tests.ascend.true_numbers import TrueNumbers

    with TrueNumbers() as numbers:
        yield numbers.calls


class Inputs:
    """The same random numbers on any device."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.dtype = dtype

    def __call__(self, *shape: int, grad: bool = True) -> Tensor:
        t = torch.randn(*shape, generator=self.generator).to(self.dtype)
        return t.to(bootstrap().device).requires_grad_(grad)


def backward(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Output and gradients by the inputs of a sum that weighs every number differently."""
    weights = torch.linspace(-1, 1, out.numel()).to(out.device).view(out.shape)
    (out.float() * weights).sum().backward()
    return [t.detach().cpu() for t in (out, *(t.grad for t in inputs))]  # type: ignore[union-attr]


def kernel_results(dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Every kernel of ``device.kernels``, forward and backward."""
    make = Inputs(dtype)
    x, weight, t, halves = make(6, 2, 4, 64), make(64), make(6, 2, 4, 64), make(6, 2, 64)
    angles = torch.arange(6.0)[:, None, None, None] * torch.linspace(0.1, 1, 64)
    cos, sin = angles.cos().to(x.device), angles.sin().to(x.device)
    with true_numbers():
        results = {
            "rms_norm": backward(kernels.rms_norm(x, weight, 1e-6), x, weight),
            "rotate": backward(kernels.rotate(t, cos, sin), t),
            "swiglu": backward(kernels.swiglu(halves), halves),
        }
        if dtype == torch.bfloat16:
            a, b = make(64, 32), make(4, 32, 48)
            counts = torch.tensor([16, 0, 30, 18])
            results["grouped_matmul"] = backward(kernels.grouped_matmul(a, b, counts), a, b)
    return results


def attention_results(backend: str) -> tuple[dict[str, list[Tensor]], dict[str, list[Any]]]:
    """Every attention of ``ATTENTIONS``, forward and backward, and the operators' arguments."""
    results, recorded = {}, {}
    for name, (d, dv, heads, groups, queries, keys, window) in ATTENTIONS.items():
        make = Inputs(torch.float32)
        q, k, v = make(queries, 2, heads, d), make(keys, 2, groups, d), make(keys, 2, groups, dv)
        with true_numbers() as calls:
            q4, k4, v4 = (t.permute(1, 2, 0, 3) for t in (q, k, v))
            out = ATTENTION_BACKENDS[backend](q4, k4, v4, window, 0.1)
            results[name] = backward(out, q, k, v)
        recorded[name] = list(calls)
    return results, recorded


def sink_results(backend: str) -> dict[str, list[Tensor]]:
    """Those of ``WITH_SINKS`` with a sink logit per head: outputs and all gradients."""
    results = {}
    for name in WITH_SINKS:
        d, dv, heads, groups, queries, keys, window = ATTENTIONS[name]
        make = Inputs(torch.float32)
        q, k, v = make(queries, 2, heads, d), make(keys, 2, groups, d), make(keys, 2, groups, dv)
        sink = make(heads)
        with true_numbers():
            q4, k4, v4 = (t.permute(1, 2, 0, 3) for t in (q, k, v))
            out = ATTENTION_BACKENDS[backend](q4, k4, v4, window, 0.1, sink=sink)
            results[name] = backward(out, q, k, v, sink)
    return results


def schemas() -> dict[str, str]:
    """Of the operators as torch_npu registers them."""
    return {name: str(getattr(torch.ops.npu, name).default._schema) for name in OPERATORS}


def meta_shapes() -> dict[str, Any]:
    """Shapes by torch_npu's own meta kernels."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    mask = torch.empty(2048, 2048, dtype=torch.bool, device="meta")
    attend = torch.ops.npu.npu_fusion_attention
    q, k, v = meta(4096, 1, 32 * 192), meta(4096, 1, 32 * 192), meta(4096, 1, 32 * 128)
    band = {"sparse_mode": 4, "pre_tockens": 127, "next_tockens": 0}
    return {
        "mla": attend(q, k, v, 32, "SBH", atten_mask=mask, sparse_mode=3)[0].shape,
        "window": attend(
            meta(4096, 1, 4096),
            meta(4096, 1, 1024),
            meta(4096, 1, 1024),
            32,
            "SBH",
            atten_mask=mask,
            **band,
        )[0].shape,
        "rms_norm": torch.ops.npu.npu_rms_norm(meta(6, 2, 64), meta(64))[0].shape,
        "swiglu": torch.ops.npu.npu_swiglu(meta(6, 2, 64)).shape,
    }


def operators() -> dict[str, Any]:
    """All that needs no model, in one process."""
    from tests.ascend.packed import document_results

    return {
        "accelerator": (str(bootstrap().device), bootstrap().dist_backend),
        "schemas": schemas(),
        "meta": meta_shapes(),
        torch.float32: kernel_results(torch.float32),
        torch.bfloat16: kernel_results(torch.bfloat16),
        "attention": attention_results("npu_fusion"),
        "sink": sink_results("npu_fusion"),
        "documents": document_results("npu_fusion"),
    }


def in_python(folder: Path) -> dict[str, Any]:
    """All that the NPU in Python can show, in one process."""
    return {
        "accelerator": (str(bootstrap().device), bootstrap().dist_backend),
        "kernels": kernel_results(torch.float32),
        "attention": attention_results("npu_fusion")[0],
        "sink": sink_results("npu_fusion"),
        "losses": layers_and_losses(folder),
    }


def train(
    stage: int, folder: Path, student: str, save: Path, fields: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[tuple[str, dict[str, Any]]]]:
    """A short run: its metrics, and the operators' arguments."""
    cls = (Stage1Recipe, Stage2Recipe)[stage - 1]
    recipe = small_recipe(
        cls,
        folder,
        student,
        save,
        train_iters=2,
        log_interval=1,
        global_batch_size=4,
        adam_eps=1e-6,
        **fields,
    )
    with true_numbers() as calls:
        training_loop(prepare(recipe))
    lines = (save / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], list(calls)


def train_all(
    jobs: dict[str, tuple[Any, ...]], fitted: tuple[Path, Path] | None = None
) -> dict[str, Any]:
    """Several runs in one process, which joins its own groups; arguments of ``fit``, if any."""
    found: dict[str, Any] = {"fit": fit(*fitted)} if fitted else {}
    for name, job in jobs.items():
        found[name] = train(*job)
        stop_processes()
    return found


def fit(folder: Path, save: Path) -> dict[str, Tensor]:
    """First weights of an MLA student, fitted to the teacher on some of its text."""
    config = EditConfig(
        teacher=str(folder / "hf"),
        save=str(save),
        student_attention="mla",
        flags={},
        init="teacher",
        seed=3,
        calibration_data_path=[str(folder / "data")],
        calibration_tokens=512,
        seq_length=64,
    )
    with true_numbers():
        checkpoint = edit(config)
    dcp_to_torch_save(checkpoint, save / "weights.pt")
    # Written by the line before.
    state = torch.load(save / "weights.pt", weights_only=False)
    return {name: t for name, t in state.items() if isinstance(t, Tensor)}


def layers_and_losses(folder: Path) -> dict[str, list[Tensor]]:
    """Both losses of each student and all gradients, from the modules alone, float32."""
    accelerator = start_processes(ParallelConfig())
    teacher = load_teacher(str(folder / "hf"), ParallelConfig(), torch.float32, accelerator)
    found: dict[str, list[Tensor]] = {}
    for student in STUDENTS:
        found |= _losses(folder, teacher, student)
    return found


def _losses(folder: Path, teacher: Teacher, name: str) -> dict[str, list[Tensor]]:
    student = Student(teacher, *find_student(str(folder / name)), attention_backend="auto")
    ((trained,),) = [[modules] for modules in student.trained_modules()]
    device = bootstrap().device
    tokens = random_tokens(length=64).to(device)
    positions = torch.arange(64).expand_as(tokens).to(device)
    mask = torch.ones(tokens.shape).to(device)

    layerwise = LayerwiseDistillation(teacher.model, student.attentions).train()
    hidden = layerwise(tokens, positions, mask)
    stage1 = [hidden, layerwise.sums, *_gradients(trained)]
    (chunk,) = student.chunks
    model_level = ModelLevelDistillation(
        teacher.model,
        chunk,
        trained,
        config=ModelLevelConfig(feature_matching_weight=0.5),
        vocab_size=teacher.hf.vocab_size,
        num_matched=len(student.attentions),
    ).train()
    loss, sums = model_level.loss(
        model_level(tokens, positions, mask), tokens, mask, with_lm_loss=False
    )
    loss.backward()
    found = {
        f"stage 1, {name}": stage1,
        f"stage 2, {name}": [loss, *sums, *_gradients(trained)],
    }
    return {key: [t.detach().cpu().clone() for t in numbers] for key, numbers in found.items()}


def _gradients(modules: list[Any]) -> list[Tensor]:
    """Taken out, so that the next backward restarts."""
    found = []
    for module in modules:
        for param in module.parameters():
            found.append(param.grad)
            param.grad = None
    return found


def settings(config: Any) -> dict[str, str]:
    """Every field of a configuration, functions by name."""
    return {
        name: getattr(value, "__qualname__", None) or repr(value)
        for name, value in vars(config).items()
    }


def config_of(folder: Path) -> dict[str, str]:
    """The teacher's, on this device."""
    hf = read_hf_config(folder / "hf")
    return settings(transformer_config(hf, ParallelConfig(), torch.float32))


def under_mindspeed(jobs: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What the adaptor leaves of the layers' classes, then runs."""
    adaptor = bootstrap().adaptor
    assert adaptor is not None
    parallel = ParallelConfig()
    start_processes(parallel)
    _, folder, student, _, _ = next(iter(jobs.values()))
    with true_numbers():
        teacher = load_teacher(str(folder / "hf"), parallel, torch.float32, bootstrap())
        edited = Student(teacher, *find_student(str(folder / student)), attention_backend="auto")
    layer, attention = teacher.model.decoder.layers[0], next(iter(edited.attentions.values()))
    parts = {
        "input_layernorm": layer.input_layernorm,
        "self_attention": layer.self_attention,
        "core_attention": layer.self_attention.core_attention,
        "student": attention,
        "student core_attention": attention.core_attention,
        "final_layernorm": teacher.model.decoder.final_layernorm,
    }
    found = {
        "adaptor": adaptor.name,
        "config": settings(teacher.model.config),
        "repatches": adaptor.repatch is not None,
        "classes": {
            name: f"{type(m).__module__}.{type(m).__qualname__}" for name, m in parts.items()
        },
        "backends": {m.core_attention.backend.__name__ for m in (layer.self_attention, attention)},
    }
    stop_processes()
    return {**found, "runs": train_all(jobs)}
