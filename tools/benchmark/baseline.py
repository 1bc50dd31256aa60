"""The same work as a plain transformers script does it, with the fastest kernels that it offers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import AutoConfig
from transformers.masking_utils import create_sliding_window_causal_mask

from megatron_attnedit.core_attention.backends.sdpa import KERNELS
from megatron_attnedit.device import bootstrap
from megatron_attnedit.export.hf import causal_lm_class
from tools.benchmark.workload import Workload, random_batches

# What transformers has for windows that does not fill a mask of all pairs.
WINDOWED = "flex_attention"


def causal_lm(config: dict[str, Any], attention: str) -> Any:
    """A model with random bfloat16 weights on the device."""
    model_class = causal_lm_class(config)
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    values = {k: v for k, v in config.items() if k not in ("architectures", "auto_map", "dtype")}
    settings = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(bootstrap().device):
        model = build(settings, dtype=torch.bfloat16, attn_implementation=attention)
    return model.requires_grad_(False).eval()


def _teacher_and_student(work: Workload) -> tuple[Any, Any, list[int]]:
    edited = [i for i in range(work.hf.num_hidden_layers) if work.student.edits(i)]
    windowed = hasattr(work.student, "sliding_window") and bootstrap().compiles
    student = causal_lm(work.student.hf_config(work.hf), WINDOWED if windowed else "sdpa")
    for i in edited:
        student.model.layers[i].self_attn.requires_grad_(True)
    return causal_lm(work.hf.raw, "sdpa"), student, edited


def _mask_of_windows(student: Any, hidden: Tensor, positions: Tensor) -> Any:
    if getattr(student.config, "sliding_window", None) is None:
        return None
    return create_sliding_window_causal_mask(
        config=student.config,
        inputs_embeds=hidden,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )


def training_step(work: Workload) -> Callable[[], float]:
    """One iteration: micro-batches, then AdamW on bfloat16 weights; gives the loss."""
    teacher, student, edited = _teacher_and_student(work)
    trained = [p for p in student.parameters() if p.requires_grad]
    if work.stage == 1:
        micro_batch = _stage1(teacher, student, edited)
    else:
        micro_batch = _stage2(teacher, student)
    fused = bootstrap().fuses_adam
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), fused=fused)
    batches = random_batches(work.hf, work.seq_length, work.micro_batches, work.micro_batch_size)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=trained[0].device)
        with sdpa_kernel(KERNELS, set_priority=True):
            for batch in batches:
                total += micro_batch(batch.tokens, work.micro_batches)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(total)

    return step


def _stage1(teacher: Any, student: Any, edited: list[int]) -> Callable[[Tensor, int], Tensor]:
    """A hook on each edited layer of the teacher; backward at once, as one would write it."""
    attentions = {i: student.model.layers[i].self_attn for i in edited}
    state: dict[str, Any] = {}
    rotary = student.model.rotary_emb
    config = student.config
    student.model.layers = student.lm_head = student.model.embed_tokens = None
    student.model.rotary_emb = rotary

    def hook(i: int) -> Any:
        def compare(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            hidden, target = kwargs["hidden_states"].detach(), output[0].detach()
            with torch.enable_grad():
                out = attentions[i](
                    hidden_states=hidden,
                    position_embeddings=state["positions"],
                    attention_mask=state["mask"],
                )[0]
                error = (out.float() - target.float()).pow(2).sum()
                loss = error / target.float().pow(2).sum() / state["micro_batches"]
                loss.backward()
            state["loss"] += loss.detach()

        return compare

    for i in edited:
        teacher.model.layers[i].self_attn.register_forward_hook(hook(i), with_kwargs=True)

    def micro_batch(tokens: Tensor, micro_batches: int) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = torch.empty(*tokens.shape, config.hidden_size, device=tokens.device)
        hidden = hidden.bfloat16()
        state.update(
            positions=rotary(hidden, positions),
            mask=_mask_of_windows(student, hidden, positions),
            loss=torch.zeros((), device=tokens.device),
            micro_batches=micro_batches,
        )
        with torch.no_grad():
            teacher.model(tokens, use_cache=False)
        return state["loss"]

    return micro_batch


def _stage2(teacher: Any, student: Any) -> Callable[[Tensor, int], Tensor]:
    """Full logits of both models and torch's ``kl_div``."""

    def micro_batch(tokens: Tensor, micro_batches: int) -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(teacher(tokens, use_cache=False).logits.float(), dim=-1)
        logits = student(tokens, use_cache=False).logits
        log_probs = F.log_softmax(logits.float(), dim=-1)
        loss = F.kl_div(
            log_probs.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True
        )
        (loss / micro_batches).backward()
        return loss.detach() / micro_batches

    return micro_batch
