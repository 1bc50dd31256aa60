"""The shape of a GateSWA student, and its side of the student-attention contract."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Generator, Tensor
from typing_extensions import Self

from megatron_attnedit.attention.cached_layers import CachedLayers, cached_by_teacher
from megatron_attnedit.attention.communication_volume import AttentionVolume, volume_of_teacher
from megatron_attnedit.attention.engines import Engine
from megatron_attnedit.attention.gate_swa import init, weight_mapping
from megatron_attnedit.attention.gate_swa.spec import gate_swa_spec
from megatron_attnedit.attention.saved_activations import SavedActivations, kept_by_teacher
from megatron_attnedit.attention.sink_fit import fit_sink_logits
from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.json_files import shown
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.core_attention.backends import FLEX_PAYS
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.core_attention.windows import (
    FULL,
    SLIDING,
    mean_visible_keys,
    parse_layers,
    uniform_full_layers,
)
from megatron_attnedit.errors import UserError

logger = logging.getLogger(__name__)

HF_CLASSES = Path(__file__).parent / "hf"
OUTPUT_GATES = ("elementwise", "headwise", "none")
LARGEST_WINDOW = 2**31 - 1
SINK_KINDS = ("none", "logit")


@dataclass(frozen=True, kw_only=True)
class GateSWA(StudentAttention):
    """Layers in ``full_layers`` keep the teacher's attention, the others slide and have a gate.

    Attributes:
        num_layers: Of the teacher.
        sliding_window: Tokens a sliding layer sees, the token itself counted.
        full_layers: 0-based indices.
        output_gate: ``elementwise`` (one gate per output dimension), ``headwise`` or ``none``.
        sink_tokens: First tokens of the sequence that a sliding layer sees beside its window;
            no server keeps them.
        sink: ``logit``: the softmax of each head of a sliding layer has one more entry, of a size
            that is learned and without a value; servers have it.
    """

    name: ClassVar[str] = "gate_swa"
    TITLE: ClassVar[str] = "GateSWA"
    FLAGS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sliding_window": {"type": int, "help": "tokens seen, itself counted (default 128)"},
        "sink": {
            "help": "logit (default; with --sink-tokens none): each head's softmax has one more "
            "entry, learned and without a value, which servers have, too; or none"
        },
        "sink_tokens": {
            "type": int,
            "help": "first tokens of the sequence that sliding layers see beside the window "
            "(default 0); for research: only transformers keeps them, no server does",
        },
        "full_layers": {
            "help": "layers that stay full, such as 4,9, or none; auto, at edit time: as many as "
            "by default, those without whose long-range attention the teacher's loss rises most "
            "(default: every fifth)"
        },
        "output_gate": {"help": "elementwise (default), headwise or none"},
    }
    of_teacher: ClassVar[Mapping[str, str]] = {"num_layers": "num_hidden_layers"}
    num_layers: int
    sliding_window: int
    full_layers: tuple[int, ...]
    output_gate: str = "elementwise"
    sink_tokens: int = 0
    sink: str = "none"

    def __post_init__(self) -> None:
        if self.sliding_window < 2:
            raise UserError(f"--sliding-window {self.sliding_window}: expected at least 2 tokens")
        if self.sink_tokens < 0:
            raise UserError(f"--sink-tokens {self.sink_tokens}: expected 0 or more tokens")
        if self.output_gate not in OUTPUT_GATES:
            gate = str(self.output_gate)[:40]  # a file may hold anything
            raise UserError(f"--output-gate {gate}: expected one of {', '.join(OUTPUT_GATES)}")
        if max(self.sliding_window, self.sink_tokens) > LARGEST_WINDOW:
            raise UserError(
                f"--sliding-window {shown(self.sliding_window)}, --sink-tokens "
                f"{shown(self.sink_tokens)}: expected at most {LARGEST_WINDOW}"
            )
        wrong = [i for i in self.full_layers if i not in range(self.num_layers)]
        if wrong or len(set(self.full_layers)) < len(self.full_layers):
            raise UserError(
                f"--full-layers {shown(wrong or self.full_layers)}: expected different layers of "
                f"0 to {self.num_layers - 1}"
            )
        if self.sink not in SINK_KINDS:
            raise UserError(
                f"--sink {str(self.sink)[:40]}: expected one of {', '.join(SINK_KINDS)}"
            )
        if self.sink_tokens and self.sink_logits:
            raise UserError(f"--sink logit: takes the place of --sink-tokens {self.sink_tokens}")
        if len(self.full_layers) >= self.num_layers:
            raise UserError("--full-layers names every layer: nothing is left to edit")

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], teacher: HFConfig) -> Self:
        num_layers = teacher.num_hidden_layers
        full_layers = uniform_full_layers(num_layers)
        if flags.get("full_layers") is not None:
            full_layers = parse_layers(
                flags["full_layers"], num_layers=num_layers, flag="--full-layers"
            )
        window = flags.get("sliding_window")
        sink_tokens = flags.get("sink_tokens") or 0
        if sink_tokens:
            logger.warning(
                "--sink-tokens %s: transformers only, no server keeps them; --sink logit is served",
                sink_tokens,
            )
        return cls(
            num_layers=num_layers,
            sliding_window=128 if window is None else window,
            full_layers=full_layers,
            output_gate=flags.get("output_gate") or "elementwise",
            sink_tokens=sink_tokens,
            sink=flags.get("sink") or ("none" if sink_tokens else "logit"),
        )

    @classmethod
    def measured_flag(cls, flags: Mapping[str, Any]) -> str | None:
        return "--full-layers auto" if flags.get("full_layers") == "auto" else None

    @property
    def sink_logits(self) -> bool:
        """Does every sliding layer have a sink logit per head?"""
        return self.sink == "logit"

    @property
    def visible_tokens(self) -> int:
        """Most tokens that a sliding layer sees and a server caches."""
        return self.sliding_window + self.sink_tokens

    def edits(self, layer_idx: int) -> bool:
        return layer_idx not in self.full_layers

    def spec(self, config: TransformerConfig, *, attention_backend: str) -> ModuleSpec:
        return gate_swa_spec(
            sliding_window=self.sliding_window,
            sink_tokens=self.sink_tokens,
            sink_logits=self.sink_logits,
            output_gate=self.output_gate,
            qk_layernorm=config.qk_layernorm,
            attention_backend=attention_backend,
        )

    def rows(self, teacher: HFConfig, layer_idx: int) -> list[ParamMapping]:
        return weight_mapping.gate_swa_rows(
            teacher, self.output_gate, layer_idx, sink_logits=self.sink_logits
        )

    def init_random(
        self, teacher_weights: Mapping[str, Tensor], teacher: HFConfig, generator: Generator
    ) -> dict[str, Tensor]:
        weights = init.random_weights(self.output_gate, teacher_weights, teacher, generator)
        if self.sink_logits:
            weights[weight_mapping.SINKS] = torch.zeros(teacher.num_attention_heads)
        return weights

    def init_from_teacher(
        self,
        teacher_weights: Mapping[str, Tensor],
        teacher: HFConfig,
        inputs: Tensor,
        layer_idx: int,
        documents: Documents | None = None,
    ) -> dict[str, Tensor]:
        weights = init.copy_of_teacher(self.output_gate, teacher_weights, teacher)
        if self.sink_logits:
            weights[weight_mapping.SINKS] = fit_sink_logits(
                weights,
                teacher,
                inputs,
                sliding_window=self.sliding_window,
                gate=init.open_gate(self.output_gate),
                documents=documents,
            )
        return weights

    def hf_config(self, teacher: HFConfig) -> dict[str, Any]:
        layer_types = [SLIDING if self.edits(i) else FULL for i in range(self.num_layers)]
        added = {"sliding_window": self.sliding_window, "output_gate": self.output_gate}
        if self.sink_tokens:
            added["sink_tokens"] = self.sink_tokens
        if self.sink_logits:
            added["sink"] = self.sink
        return weight_mapping.gate_swa_config(teacher, layer_types, added)

    def describe(self) -> str:
        sinks = f" and {self.sink_tokens} sinks" if self.sink_tokens else ""
        sinks += " and sink logits" if self.sink_logits else ""
        return f"GateSWA window {self.sliding_window}{sinks}"

    def score_flops(self, teacher: HFConfig, seq_length: int) -> float:
        heads = teacher.num_attention_heads * teacher.head_dim
        return 4 * heads * mean_visible_keys(seq_length, self.visible_tokens)

    def hf_modeling_files(self, teacher: HFConfig) -> Sequence[Path]:
        names = ("configuration", "modeling", "sinks", "sink_logits")
        return [HF_CLASSES / f"{name}_gate_swa.py" for name in names]

    def engines(self, teacher: HFConfig) -> Sequence[Engine]:
        problem = None
        if self.sink_tokens:
            problem = "no engine's cache keeps first tokens (--sink-tokens) beside a window"
        return (
            Engine("transformers", "trust_remote_code=True"),
            Engine("vllm", "with this package installed beside it, a plug-in", problem),
            Engine("vllm-transformers", "--trust-remote-code --model-impl transformers", problem),
        )

    def kv_values_per_token(self, teacher: HFConfig, context: int) -> float:
        per_layer = 2 * teacher.num_key_value_heads * teacher.head_dim
        sliding = self.num_layers - len(self.full_layers)
        kept = min(1.0, self.visible_tokens / context)
        return per_layer * (len(self.full_layers) + sliding * kept)

    def cached_layers(self, teacher: HFConfig) -> list[CachedLayers]:
        full = cached_by_teacher(teacher, len(self.full_layers))
        sliding = cached_by_teacher(teacher, self.num_layers - len(self.full_layers))
        sliding = sliding._replace(window=self.visible_tokens)
        return [sliding] if full.num_layers == 0 else [full, sliding]

    def kept_numbers(self, teacher: HFConfig) -> SavedActivations:
        kept = kept_by_teacher(teacher)
        besides, gradients = 0, kept.gradients
        if self.output_gate != "none":
            # The gate before its sigmoid, and what is multiplied by it.
            besides = gradients = weight_mapping.gate_dim(teacher, self.output_gate) + kept.output
        if self.sink_logits and self.sliding_window >= FLEX_PAYS:
            besides += kept.output  # FlexAttention's own output, which the logits act on
        return dataclasses.replace(kept, besides=kept.besides + besides, gradients=gradients)

    def communication_volume(self, teacher: HFConfig) -> AttentionVolume:
        projections = 1 if self.output_gate == "none" else 2
        return dataclasses.replace(volume_of_teacher(teacher), input_projections=projections)

    def check(self, *, tp_size: int, seq_length: int, cp_size: int = 1) -> None:
        if self.visible_tokens >= seq_length:
            sinks = f" and its {self.sink_tokens} sink tokens" if self.sink_tokens else ""
            raise UserError(
                f"--seq-length {seq_length} is not longer than the student's sliding window "
                f"{self.sliding_window}{sinks}: "
                "sliding would equal full attention and nothing be learned"
            )

    def to_dict(self) -> dict[str, Any]:
        """Without sinks where there are none, as before there could be any."""
        fields = super().to_dict()
        for name, default in (("sink_tokens", 0), ("sink", "none")):
            if fields[name] == default:
                del fields[name]
        return fields
