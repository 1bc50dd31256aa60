"""The teacher: a Megatron GPT model with a Hugging Face model's weights."""

import functools
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_attnedit.attention.core import CoreAttention
from megatron_attnedit.attention.norm import RMSNorm
from megatron_attnedit.convert.converter import hf_to_megatron
from megatron_attnedit.convert.families import ignored_names, teacher_rows
from megatron_attnedit.convert.hf_checkpoint import HFReader
from megatron_attnedit.convert.hf_config import HFConfig


def teacher_layer_spec(config: TransformerConfig, *, attention_backend: str) -> ModuleSpec:
    """Mcore's own decoder layer, with norms and core attention that run everywhere.

    ``input_layernorm`` stays a module of its own, because the student needs what comes out of it.
    """
    spec = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    layer.sharded_state_dict_keys_map = {}
    attention = layer.self_attention.submodules
    attention.core_attention = functools.partial(CoreAttention, backend=attention_backend)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary, up to a multiple of the tensor-parallel size."""
    return vocab_size + -vocab_size % tp_size


def build_teacher(
    hf: HFConfig, config: TransformerConfig, *, attention_backend: str = "auto"
) -> GPTModel:
    """Build this rank's part of the teacher, frozen, with weights that are NaN until loaded."""
    spec = teacher_layer_spec(config, attention_backend=attention_backend)
    assert config.num_layers is not None
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=RMSNorm),
        vocab_size=padded_vocab_size(hf.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=hf.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=hf.rope_theta,  # type: ignore[arg-type]
        rope_scaling=hf.rope_scaling is not None,
        rope_scaling_factor=(hf.rope_scaling or {}).get("factor", 8.0),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
    )
    return model.requires_grad_(False).eval()


def global_params(model: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """This rank's parameters, layers named by their index in the whole model."""
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
    for name, param in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, local, rest = name.split(".", 3)
            name = f"decoder.layers.{numbers[int(local)]}.{rest}"
        yield name, param


def load_teacher_from_hf(model: GPTModel, hf: HFConfig, *, progress: bool = False) -> None:
    """Fill the teacher from the directory that ``hf`` was read from.

    Raises:
        UserError: a file is missing or does not fit ``config.json``.
    """
    hf_to_megatron(
        HFReader(hf.path),
        teacher_rows(hf),
        dict(global_params(model)),
        ignored=ignored_names(hf),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        progress=progress,
    )


def backbone(model: GPTModel, tokens: Tensor, position_ids: Tensor) -> Tensor:
    """Hidden states after this pipeline stage's last layer, without the output head.

    Args:
        model: Teacher or student.
        tokens: ``[b, s]``.
        position_ids: ``[b, s]``.

    Returns:
        ``[s, b, h]``, or ``[s/tp, b, h]`` under sequence parallelism; normed on the last stage.
    """
    decoder_input = model.embedding(tokens, position_ids) if model.pre_process else None
    return model.decoder(
        hidden_states=decoder_input,
        attention_mask=None,
        rotary_pos_emb=model.rotary_pos_emb(tokens.shape[1]),
    )


def output_weight(model: GPTModel) -> Tensor:
    """This rank's rows ``[v/tp, h]`` of the output head; last pipeline stage only."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def vocab_parallel_logits(model: GPTModel, hidden: Tensor) -> Tensor:
    """Logits ``[s, b, v/tp]`` of hidden states ``[s, b, h]`` (or ``[s/tp, b, h]``)."""
    weight = output_weight(model) if model.share_embeddings_and_output_weights else None
    logits, _ = model.output_layer(hidden, weight=weight)
    return logits


@torch.no_grad()
def full_logits(model: GPTModel, tokens: Tensor, vocab_size: int) -> Tensor:
    """Logits ``[b, s, v]`` on every rank; for tests and sanity checks, not for training."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    logits = vocab_parallel_logits(model, backbone(model, tokens, position_ids))
    return gather_from_tensor_model_parallel_region(logits)[..., :vocab_size].transpose(0, 1)
