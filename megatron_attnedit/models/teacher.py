"""The teacher: a Megatron GPT model with a Hugging Face model's weights."""

import functools
from collections.abc import Container, Iterator, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_attnedit.attention.norm import RMSNorm
from megatron_attnedit.attention.rotary import rotary_table
from megatron_attnedit.attention.self_attention import CausalSelfAttention
from megatron_attnedit.convert.families import ignored_names
from megatron_attnedit.convert.grouped_experts import expert_by_expert
from megatron_attnedit.convert.hf_checkpoint import HFReader
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.load_weights import hf_to_megatron
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.core_attention.module import CoreAttention
from megatron_attnedit.models.experts import mark_expert_gradients, use_local_dispatcher
from megatron_attnedit.models.grouped_experts import GroupedMoELayer
from megatron_attnedit.models.parallel_layout import place_of_this_process
from megatron_attnedit.models.transformer_engine import (
    check_transformer_impl,
    layer_norm,
    use_transformer_engine,
)

EMBEDDING = "embedding.word_embeddings.weight"


def teacher_layer_spec(config: TransformerConfig, *, attention_backend: str) -> ModuleSpec:
    """Mcore's own decoder layer, with norms and core attention that run everywhere.

    ``input_layernorm`` stays a module of its own, because the student needs what comes out of it.
    """
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = layer_norm(config, RMSNorm)
    layer.sharded_state_dict_keys_map = {}
    if config.transformer_impl == "transformer_engine":
        use_transformer_engine(layer, config)
    elif config.moe_grouped_gemm:
        layer.mlp = GroupedMoELayer
    layer.self_attention.module = CausalSelfAttention
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
) -> list[GPTModel]:
    """Build this rank's part of the teacher, frozen, with weights that are NaN until loaded.

    Returns:
        The pieces of the model on this rank: one, or several when the pipeline is interleaved.

    Raises:
        UserError: Transformer Engine is asked for and cannot be used here.
    """
    check_transformer_impl(config.transformer_impl)
    chunks = config.virtual_pipeline_model_parallel_size
    if chunks is None:
        return [_build_chunk(hf, config, None, attention_backend)]
    return [_build_chunk(hf, config, i, attention_backend) for i in range(chunks)]


def _build_chunk(
    hf: HFConfig, config: TransformerConfig, vp_stage: int | None, attention_backend: str
) -> GPTModel:
    spec = teacher_layer_spec(config, attention_backend=attention_backend)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    model = GPTModel(
        config,
        TransformerBlockSubmodules(
            layer_specs=[spec] * count, layer_norm=layer_norm(config, RMSNorm)
        ),
        vocab_size=padded_vocab_size(hf.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=hf.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=hf.rope_theta,  # type: ignore[arg-type]
        rope_scaling=hf.rope_scaling is not None,
        rope_scaling_factor=(hf.rope_scaling or {}).get("factor", 8.0),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(False, vp_stage),
        vp_stage=vp_stage,
    )
    use_local_dispatcher(model)
    mark_expert_gradients(model)
    return model.requires_grad_(False).eval()


def global_name(model: GPTModel, name: str) -> str:
    """A parameter's name with layer and expert indices of the whole model.

    Args:
        model: This rank's piece.
        name: Its name in that piece.
    """
    if not name.startswith("decoder.layers."):
        return name
    decoder, layers, local, rest = name.split(".", 3)
    number = model.decoder.layers[int(local)].layer_number
    before, experts, after = rest.partition(".local_experts.")
    if experts:
        expert, parameter = after.split(".", 1)
        per_rank = model.config.num_moe_experts // model.config.expert_model_parallel_size
        index = parallel_state.get_expert_model_parallel_rank() * per_rank + int(expert)
        rest = f"{before}{experts}{index}.{parameter}"
    return f"{decoder}.{layers}.{number - 1}.{rest}"


def global_params(model: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """This rank's parameters under their names in the whole model, grouped experts one by one."""
    config = model.config
    count = (config.num_moe_experts or 0) // config.expert_model_parallel_size
    for name, param in model.named_parameters():
        for part, tensor in expert_by_expert(name, param, count, config.hidden_size):
            yield global_name(model, part), tensor


def load_from_hf(
    chunks: Sequence[GPTModel],
    reader: HFReader,
    rows: Sequence[ParamMapping],
    hf: HFConfig,
    *,
    only: Container[str] | None = None,
    progress: bool = False,
) -> None:
    """Fill this rank's pieces from Hugging Face files; every rank reads its own slices.

    Args:
        chunks: Pieces of a teacher or student.
        reader: The files.
        rows: Everything that is in them.
        hf: The teacher's configuration.
        only: Names of the parameters to fill, with indices of the whole model; None: all.
        progress: Show a progress bar.

    Raises:
        UserError: the files do not fit the rows.
    """
    params = {
        name: param
        for chunk in chunks
        for name, param in global_params(chunk)
        if only is None or name in only
    }
    if hf.tie_word_embeddings and "output_layer.weight" in params:
        # The last pipeline stage has a copy of its own.
        params[EMBEDDING] = params.pop("output_layer.weight")
    hf_to_megatron(
        reader,
        rows,
        params,
        ignored=ignored_names(hf),
        place=place_of_this_process(),
        progress=progress,
    )


def can_be_captured(config: TransformerConfig) -> bool:
    """Are the teacher's shapes known beforehand, and does nothing wait while it is recorded?

    Experts get as many tokens as the router sends them, which only this program's grouped product
    of those of one process needs not know. Recording waits for the device, and an interleaved
    pipeline's device for what a process sends that may be recording, too. Context parallelism was
    not tried.
    """
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    sizes = (
        config.expert_model_parallel_size,
        config.expert_tensor_parallel_size,
        config.tensor_model_parallel_size,
    )
    ours = config.moe_grouped_gemm and config.transformer_impl == "local"
    known = ours and max(sizes) == 1
    experts = config.num_moe_experts and not known
    return not (interleaved or experts or config.context_parallel_size > 1)


def first_hidden(model: GPTModel, tokens: Tensor, position_ids: Tensor) -> Tensor:
    """What enters this pipeline stage's first layer: embedded tokens, or what was received.

    Args:
        model: Teacher or student.
        tokens: ``[b, s]``; s is this rank's share under context parallelism.
        position_ids: ``[b, s]``.

    Returns:
        ``[s, b, h]``, or ``[s/tp, b, h]`` under sequence parallelism.
    """
    if model.pre_process:
        return model.embedding(tokens, position_ids)
    return model.decoder.input_tensor


def through_layers(model: GPTModel, hidden: Tensor, documents: Documents | None = None) -> Tensor:
    """Hidden states after this pipeline stage's last layer, without the output head.

    Args:
        model: Teacher or student.
        hidden: As from ``first_hidden``; it says how long a sequence is.
        documents: Of the samples; None: all tokens of a sample see each other.

    Returns:
        As hidden; normed on the last stage.
    """
    config = model.config
    shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
    seq_length = hidden.shape[0] * shards * config.context_parallel_size
    recompute = config.recompute_granularity == "full" and torch.is_grad_enabled()
    if model.pre_process and recompute and not hidden.requires_grad:
        # The embedding is frozen, and recomputed layers need something to hang a gradient on.
        hidden.requires_grad_()
    if not model.pre_process:
        model.set_input_tensor(hidden)  # mcore's later stages look nowhere else
    return model.decoder(
        hidden_states=hidden,
        attention_mask=None,
        rotary_pos_emb=rotary_table(model.rotary_pos_emb, seq_length, documents),
        packed_seq_params=documents,
    )


def backbone(
    model: GPTModel, tokens: Tensor, position_ids: Tensor, documents: Documents | None = None
) -> Tensor:
    """Hidden states after this pipeline stage's last layer; arguments as of both before it."""
    return through_layers(model, first_hidden(model, tokens, position_ids), documents)


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
