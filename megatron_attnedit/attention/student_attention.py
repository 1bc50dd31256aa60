"""What a student attention provides to the rest of the package."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Generator, Tensor
from typing_extensions import Self

from megatron_attnedit.attention.cached_layers import CachedLayers
from megatron_attnedit.attention.communication_volume import AttentionVolume
from megatron_attnedit.attention.engines import Engine
from megatron_attnedit.attention.saved_activations import SavedActivations
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.json_files import shown
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.errors import UserError

# From an exported tensor's name and the tensor to the padded tensor.
Padding = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class StudentAttention(ABC):
    """One attention that can take the place of the teacher's, and its dimensions.

    A new one is a folder beside the others (config, module, spec, rows, init, reference) and one
    entry in ``registry.STUDENT_ATTENTIONS``. No other file names an architecture. Weights without a
    tensor-parallel cut are float32 and keyed by their name inside ``self_attention``, for example
    ``linear_proj.weight``.
    """

    name: ClassVar[str]
    # Of the group of flags in ``--help``, and the flags: name to what argparse takes for it. Two
    # student attentions do not have a flag of one name.
    TITLE: ClassVar[str]
    FLAGS: ClassVar[Mapping[str, Mapping[str, Any]]]
    # Fields that are the teacher's, with their names in its configuration.
    of_teacher: ClassVar[Mapping[str, str]] = {}

    @classmethod
    @abstractmethod
    def from_flags(cls, flags: Mapping[str, Any], teacher: HFConfig) -> Self:
        """From command-line values (None where not given), completed for this teacher.

        Raises:
            UserError: a value that cannot work, naming the flag.
        """

    @classmethod
    def measured_flag(cls, flags: Mapping[str, Any]) -> str | None:
        """The flag whose value an edit has to measure on the teacher first; None for none."""
        return None

    def without_calibration(self, flags: Mapping[str, Any]) -> Self:
        """What a random start makes of it, without text on which anything could be measured.

        Raises:
            UserError: a flag asks for what is measured.
        """
        return self

    def measured_on(
        self,
        teacher: HFConfig,
        layers: Iterable[tuple[Mapping[str, Tensor], Tensor]],
        documents: Documents | None = None,
    ) -> Self:
        """Completed by what is measured on the teacher before initial weights are made.

        Args:
            teacher: Its configuration.
            layers: Of each layer its attention's weights and what enters it, ``[s, c, h]``; not
                begun where nothing is measured.
            documents: Of the c samples; None: all tokens of a sample see each other.
        """
        return self

    @abstractmethod
    def edits(self, layer_idx: int) -> bool:
        """Does layer ``layer_idx`` (0-based) get the new attention, or keep the teacher's?"""

    @abstractmethod
    def spec(self, config: TransformerConfig, *, attention_backend: str) -> ModuleSpec:
        """The module that replaces ``self_attention`` in an edited layer of that model."""

    @abstractmethod
    def rows(self, teacher: HFConfig, layer_idx: int) -> list[ParamMapping]:
        """Names and layouts of an edited layer's attention in the exported checkpoint."""

    @abstractmethod
    def init_random(
        self, teacher_weights: Mapping[str, Tensor], teacher: HFConfig, generator: Generator
    ) -> dict[str, Tensor]:
        """Random weights; ``linear_proj`` is inherited."""

    @abstractmethod
    def init_from_teacher(
        self,
        teacher_weights: Mapping[str, Tensor],
        teacher: HFConfig,
        inputs: Tensor,
        layer_idx: int,
        documents: Documents | None = None,
    ) -> dict[str, Tensor]:
        """Weights with which the layer starts close to the teacher's.

        Args:
            teacher_weights: The teacher's attention of this layer.
            teacher: Its configuration.
            inputs: ``[s, c, h]``, what enters this attention for c samples of s tokens.
            layer_idx: 0-based.
            documents: Of the c samples; None: all tokens of a sample see each other.
        """

    @abstractmethod
    def hf_config(self, teacher: HFConfig) -> dict[str, Any]:
        """``config.json`` of the exported student."""

    @abstractmethod
    def describe(self) -> str:
        """Name and sizes in a few words, for tables."""

    @abstractmethod
    def score_flops(self, teacher: HFConfig, seq_length: int) -> float:
        """Operations of scores and values: forward, per token of an edited layer."""

    def hf_modeling_files(self, teacher: HFConfig) -> Sequence[Path]:
        """Modelling files shipped with an export; none where a stock class loads it."""
        return ()

    def hf_zeros(self, teacher: HFConfig) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of tensors of zeros that a class expects and this student has not."""
        return {}

    def engines(self, teacher: HFConfig) -> Sequence[Engine]:
        """What an export is for, and what it is not for."""
        own = bool(self.hf_modeling_files(teacher))
        return (Engine("transformers", "trust_remote_code=True" if own else "a stock class"),)

    def padded(self, teacher: HFConfig, cached: int) -> tuple[Self, Padding]:
        """The same function in sizes that inference engines have kernels for.

        Args:
            teacher: Its configuration.
            cached: Numbers in the cache of a token in a layer; 0: the fewest that are served.

        Returns:
            The padded student, and how its exported tensors are made.

        Raises:
            UserError: no such sizes hold this student.
        """
        raise UserError(f"--pad-for-serving: {self.name} has no sizes to pad")

    @abstractmethod
    def kv_values_per_token(self, teacher: HFConfig, context: int) -> float:
        """Cached elements per token of a context that long, all layers together."""

    @abstractmethod
    def cached_layers(self, teacher: HFConfig) -> list[CachedLayers]:
        """What an inference engine caches, of MLA padded to sizes that it has kernels for."""

    def serving_warning(self, teacher: HFConfig) -> str | None:
        """Why no inference engine serves this student as it is; None where one does."""
        problems = [e.problem for e in self.engines(teacher) if e.name != "transformers"]
        return problems[0] if problems and all(problems) else None

    @abstractmethod
    def kept_numbers(self, teacher: HFConfig) -> SavedActivations:
        """What an edited layer's attention keeps for backward."""

    @abstractmethod
    def communication_volume(self, teacher: HFConfig) -> AttentionVolume:
        """What the processes exchange that share an edited layer's attention."""

    def check(self, *, tp_size: int, seq_length: int, cp_size: int = 1) -> None:  # noqa: B027
        """Refuse a run in which this attention cannot work or cannot learn.

        Args:
            tp_size: Tensor-parallel size.
            seq_length: Tokens of a sample.
            cp_size: Context-parallel size; an attention that needs the whole sequence in one
                process refuses more than 1.

        Raises:
            UserError: names the flag.
        """

    def check_teacher(self, teacher: HFConfig) -> None:
        """Refuse a teacher for which this attention was not made.

        Raises:
            UserError: names what differs.
        """
        for mine, theirs in self.of_teacher.items():
            here, there = getattr(self, mine), getattr(teacher, theirs)
            if here != there:
                raise UserError(
                    f"the student attention {self.name} has {mine} {shown(here)}, its teacher in "
                    f"{teacher.path} has {theirs} {there}"
                )

    def to_dict(self) -> dict[str, Any]:
        """For the lineage of a checkpoint."""
        return {"name": self.name, **asdict(self)}
