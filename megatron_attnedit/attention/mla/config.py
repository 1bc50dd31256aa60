"""The dimensions of an MLA student, and its side of the student-attention contract."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Generator, Tensor
from typing_extensions import Self

from megatron_attnedit.attention.cached_layers import CachedLayers
from megatron_attnedit.attention.communication_volume import AttentionVolume
from megatron_attnedit.attention.engines import Engine
from megatron_attnedit.attention.mla import init, padding, weight_mapping
from megatron_attnedit.attention.mla.cache_cut import Cut, Sample, best_cut, judging_layers
from megatron_attnedit.attention.mla.dims import LATENT_SCALE, MLADims
from megatron_attnedit.attention.mla.flags import FLAGS, ROTARY, fields_from, frequency_fields
from megatron_attnedit.attention.mla.plain import mla_output
from megatron_attnedit.attention.mla.served_sizes import (
    ServedSizes,
    nearest_served,
    served,
)
from megatron_attnedit.attention.mla.spec import mla_spec
from megatron_attnedit.attention.saved_activations import SavedActivations
from megatron_attnedit.attention.student_attention import Padding, StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.json_files import shown
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.core_attention.windows import mean_visible_keys
from megatron_attnedit.errors import UserError
from megatron_attnedit.fitting.components import most_worth

logger = logging.getLogger(__name__)

HF_CLASSES = Path(__file__).parent / "hf"
NO_KERNEL = (
    "no engine has a kernel that multiplies scores by a number per token and key-value head, as "
    "--qk-norm exact needs"
)


@dataclass(frozen=True, kw_only=True)
class MLA(MLADims, StudentAttention):
    """Every layer gets multi-head latent attention.

    Attributes:
        fit: How initial weights are fitted to the teacher, a name in ``init.FITS``.
        rotary: How ``rotary_pairs`` were chosen, one of ``ROTARY``.
        cuts: Latent and rotary sizes to choose among at edit time; empty: they are given.
    """

    name: ClassVar[str] = "mla"
    TITLE: ClassVar[str] = "MLA (defaults follow from the teacher's head size)"
    FLAGS: ClassVar[Mapping[str, Mapping[str, Any]]] = FLAGS
    # Not the value heads: padded for serving, they are larger than the teacher's.
    of_teacher: ClassVar[Mapping[str, str]] = {"num_attention_heads": "num_attention_heads"}
    fit: str = "attended"
    rotary: str = "geometric"
    cuts: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary not in ROTARY:
            raise UserError(f"--mla-rotary {self.rotary}: expected one of {', '.join(ROTARY)}")
        if bool(self.rotary_pairs) != (self.rotary != "geometric"):
            raise UserError(
                f"rotary_pairs {shown(self.rotary_pairs)}: expected none with the rotary part "
                f"{self.rotary}, or one list a layer"
            )
        if self.fit not in init.FITS:
            given = shown(self.fit).strip("'")
            raise UserError(f"--mla-fit {given}: expected one of {', '.join(init.FITS)}")

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], teacher: HFConfig) -> Self:
        if teacher.qkv_bias:
            raise UserError(
                f"--student-attention mla: the biases of queries, keys and values of "
                f"{teacher.path} have no place in it; gate_swa keeps them"
            )
        return cls(**fields_from(flags, teacher), latent_scale=LATENT_SCALE)

    def without_calibration(self, flags: Mapping[str, Any]) -> Self:
        if flags.get("mla_rotary") not in (None, ROTARY[0]):
            raise UserError(
                f"--mla-rotary {self.rotary}: chosen on calibration text, which --init random "
                "does not look at; give --init teacher"
            )
        if self.cuts:
            raise UserError(
                "--kv-lora-rank auto: measured on calibration text, which --init random does not "
                "look at; give --init teacher, or a number"
            )
        return dataclasses.replace(self, rotary=ROTARY[0], rotary_pairs=())

    def measured_on(
        self,
        teacher: HFConfig,
        layers: Iterable[tuple[Mapping[str, Tensor], Tensor]],
        documents: Documents | None = None,
    ) -> Self:
        if not self.rotary_pairs and not self.cuts:
            return self
        worths, judging = [], {}
        for i, (weights, inputs) in enumerate(layers):
            if self.rotary_pairs:
                worths.append(init.component_worths(weights, teacher, inputs, documents))
            if self.cuts and i in judging_layers(teacher.num_hidden_layers):
                judging[i] = (weights, inputs)
        if self.rotary == "chosen-once":  # a layer's worths as shares of what it has
            worths = [sum(worth / worth.sum() for worth in worths)] * len(worths)
        if not self.cuts:
            return self._with_components(worths)
        students = {
            cut: self._cut(Cut(*cut), teacher)._with_components(worths) for cut in self.cuts
        }

        def fit(
            cut: Cut, i: int, weights: Mapping[str, Tensor], sample: Sample
        ) -> Callable[[Sample], Tensor]:
            student, (inputs, seen) = students[cut], sample
            fitted = student.init_from_teacher(weights, teacher, inputs, i, seen)
            return lambda other: mla_output(fitted, other[0], student, teacher, i, other[1])

        cuts = list(map(Cut._make, self.cuts))
        best, errors = best_cut(cuts, judging, teacher, fit, documents)
        shown = ", ".join(f"{a} + {b}: {error:.4f}" for (a, b), error in errors.items())
        logger.info("error of fitted layers by latent + rotary part: %s", shown)
        return students[best]

    def _with_components(self, worths: Sequence[Tensor]) -> Self:
        """With the components that are worth most; without worths, as it is."""
        count = self.qk_pos_emb_head_dim // 2
        pairs = tuple(most_worth(worth, count) for worth in worths)
        return dataclasses.replace(self, rotary_pairs=pairs)

    def _cut(self, cut: Cut, teacher: HFConfig) -> Self:
        """With other sizes of latent and rotary part, nothing left to choose."""
        return dataclasses.replace(
            self,
            kv_lora_rank=cut.latent,
            qk_pos_emb_head_dim=cut.rotary,
            cuts=(),
            **frequency_fields(self.rotary, cut.rotary, teacher),
        )

    def edits(self, layer_idx: int) -> bool:
        return True

    def spec(self, config: TransformerConfig, *, attention_backend: str) -> ModuleSpec:
        return mla_spec(self, attention_backend=attention_backend)

    def rows(self, teacher: HFConfig, layer_idx: int) -> list[ParamMapping]:
        return weight_mapping.deepseek_v3_rows(self, teacher.hidden_size, layer_idx)

    def init_random(
        self, teacher_weights: Mapping[str, Tensor], teacher: HFConfig, generator: Generator
    ) -> dict[str, Tensor]:
        return init.random_weights(self, teacher_weights, teacher, generator)

    def init_from_teacher(
        self,
        teacher_weights: Mapping[str, Tensor],
        teacher: HFConfig,
        inputs: Tensor,
        layer_idx: int,
        documents: Documents | None = None,
    ) -> dict[str, Tensor]:
        fit = init.FITS[self.fit]
        return init.fit_to_teacher(
            self, teacher_weights, teacher, inputs, layer_idx, fit, documents
        )

    def hf_config(self, teacher: HFConfig) -> dict[str, Any]:
        if teacher.num_experts:
            return weight_mapping.deepseek_v2_config(self, teacher)
        return weight_mapping.deepseek_v3_config(self, teacher)

    def describe(self) -> str:
        norm = "+QK-norm" if self.qk_norm_groups else ""
        return f"MLA {self.kv_lora_rank}+{self.qk_pos_emb_head_dim}{norm}"

    def score_flops(self, teacher: HFConfig, seq_length: int) -> float:
        width = self.query_dim + self.v_head_dim
        return 2 * self.num_attention_heads * width * mean_visible_keys(seq_length, None)

    def hf_modeling_files(self, teacher: HFConfig) -> Sequence[Path]:
        names = ["modeling_mla", "modeling_moe_mla", "modeling_qk_norm_mla"]
        if not self.qk_norm_groups:
            names = names[: 2 if teacher.num_experts else 1]
        return [HF_CLASSES / f"{name}.py" for name in names]

    def hf_zeros(self, teacher: HFConfig) -> Mapping[str, tuple[int, ...]]:
        return weight_mapping.zero_shared_experts(teacher) if teacher.num_experts else {}

    def engines(self, teacher: HFConfig) -> Sequence[Engine]:
        problem, padded = served(*self._sizes()), self._padded()
        if problem and padded:
            ours = self.kv_lora_rank + self.qk_pos_emb_head_dim
            problem += (
                "; export --pad-for-serving adds zeros, and the cache is "
                f"{padded.kv_lora_rank + padded.qk_pos_emb_head_dim} elements per token and layer "
                f"instead of {ours} (the teacher's "
                f"{2 * teacher.num_key_value_heads * teacher.head_dim})"
            )
        own = "trust_remote_code=True: decodes from the latent"
        if self.qk_norm_groups:
            return Engine("transformers", own), Engine("vllm", "", NO_KERNEL)
        how = f"as {weight_mapping.architecture(self, teacher)}"
        if self.rotary_pairs:
            how += ", with this package installed beside it, a plug-in"
            stock = self.rotary == ROTARY[2] and not teacher.num_experts
            own += "; a stock class loads it, too" if stock else ""
        return Engine("transformers", own), Engine("vllm", how, problem)

    def _sizes(self) -> tuple[int, int, int, int]:
        return (
            self.kv_lora_rank, self.qk_head_dim, self.qk_pos_emb_head_dim, self.v_head_dim
        )  # fmt: skip

    def _padded(self) -> ServedSizes | None:
        """The nearest sizes that engines have kernels for, its own if they have."""
        return nearest_served(*self._sizes())

    def padded(self, teacher: HFConfig, cached: int) -> tuple[Self, Padding]:
        if self.qk_norm_groups:
            raise UserError("--pad-for-serving: no engine serves a student with --qk-norm exact")
        return padding.padded(self, cached)

    def kv_values_per_token(self, teacher: HFConfig, context: int) -> float:
        return teacher.num_hidden_layers * self.cached

    def cached_layers(self, teacher: HFConfig) -> list[CachedLayers]:
        padded, numbers = self._padded(), self.cached
        if padded and not self.qk_norm_groups:
            numbers = padded.kv_lora_rank + padded.qk_pos_emb_head_dim
        return [CachedLayers(teacher.num_hidden_layers, numbers, heads=1)]

    def kept_numbers(self, teacher: HFConfig) -> SavedActivations:
        n, query = self.num_attention_heads, self.num_attention_heads * self.query_dim
        return SavedActivations(
            # The latent with the rotary key, and the latent after its norm.
            latent=2 * self.kv_lora_rank + self.qk_pos_emb_head_dim,
            query=query,
            key_value=query + n * self.v_head_dim,
            output=n * self.v_head_dim,
            besides=2 * query if self.qk_norm_groups else 0,  # what is normed
            num_heads=n,
        )

    def communication_volume(self, teacher: HFConfig) -> AttentionVolume:
        n = self.num_attention_heads
        return AttentionVolume(
            input_projections=1,
            projected=self.kv_lora_rank,
            shared=self.qk_pos_emb_head_dim,
            keys=(n * self.query_dim, n * self.v_head_dim),
            groups=n,
        )

    def check_teacher(self, teacher: HFConfig) -> None:
        super().check_teacher(teacher)
        if self.qk_norm_groups not in (0, teacher.num_key_value_heads):
            raise UserError(
                f"the student attention mla has qk_norm_groups {self.qk_norm_groups}, its teacher "
                f"in {teacher.path} has {teacher.num_key_value_heads} key-value heads"
            )
        pairs = self.rotary_pairs
        layers, most = teacher.num_hidden_layers, teacher.head_dim // 2
        if pairs and (len(pairs) != layers or max(map(max, pairs)) >= most):
            raise UserError(
                f"the student attention mla has rotary pairs of {len(pairs)} layers up to "
                f"{max(map(max, pairs))}, its teacher in {teacher.path} has {layers} layers and "
                f"pairs 0 to {most - 1}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Without a choice of frequencies where there is none, as before there could be one."""
        fields = super().to_dict()
        if not self.rotary_pairs:
            del fields["rotary"], fields["rotary_pairs"]
        if not self.qk_norm_groups:
            del fields["qk_norm_groups"]
        if not self.cuts:
            del fields["cuts"]
        return fields

    def check(self, *, tp_size: int, seq_length: int, cp_size: int = 1) -> None:
        if self.num_attention_heads % tp_size:
            raise UserError(
                f"--tensor-model-parallel-size {tp_size} does not divide the student's "
                f"{self.num_attention_heads} attention heads"
            )
        groups = self.qk_norm_groups
        if groups and groups % tp_size and tp_size % groups:
            raise UserError(
                f"--tensor-model-parallel-size {tp_size}: with --qk-norm exact it divides the "
                f"{groups} key-value heads, or is a multiple of them"
            )
