"""What a conversion is asked for."""

from dataclasses import dataclass
from pathlib import Path

from megatron_attnedit.convert.grouped_experts import ExpertLayout
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.legacy_layout import LegacyLayout
from megatron_attnedit.convert.load_weights import check_tensor_parallel
from megatron_attnedit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """What to make of what.

    Attributes:
        source: Hugging Face directory, Megatron checkpoint, or file of edited weights.
        output: New directory; with ``edited`` a new ``.safetensors`` file.
        format: ``hf``, ``torch_dist``, ``torch`` or ``edited``.
        teacher: A student's teacher, if it is not where it was at edit time; of a ``torch``
            checkpoint that this program did not write, a directory with its ``config.json``.
        dtype: Type of the tensors; default: the teacher's, in edited weights the stored one.
        overwrite: Replace ``output`` if it exists.
        tensor_model_parallel_size: Of the ``torch`` format, which fits one layout only.
        pipeline_model_parallel_size: Likewise.
        expert_model_parallel_size: Likewise.
        moe_grouped_gemm: Likewise: experts as Megatron holds them with that flag.
        transformer_impl: With it: as this program's grouped experts hold them, which is as
            Megatron's of old, or as Transformer Engine's.
        pad_for_serving: Numbers that the cache of a token in a layer shall have, of the ``hf``
            format; 0: the fewest that are served; None: no padding.
        report: ``report.json`` of an evaluation, for the model card of the ``hf`` format.
        push: Repository of the Hugging Face Hub to upload the output to, of the ``hf`` format.
    """

    source: Path
    output: Path
    format: str
    teacher: str | None = None
    dtype: str | None = None
    overwrite: bool = False
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    moe_grouped_gemm: bool = False
    transformer_impl: str = "local"
    pad_for_serving: int | None = None
    report: Path | None = None
    push: str | None = None

    def __post_init__(self) -> None:
        sizes = (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
        )
        for name in sizes:
            flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
            if getattr(self, name) < 1:
                raise UserError(f"{flag}: must be at least 1")
            if self.format != "torch" and getattr(self, name) > 1:
                raise UserError(
                    f"{flag}: any layout loads {self.format}; only torch fits one layout"
                )
        if self.moe_grouped_gemm and self.format != "torch":
            raise UserError(f"--moe-grouped-gemm: {self.format} knows one layout of experts only")
        if self.transformer_impl != "local" and not self.moe_grouped_gemm:
            raise UserError(
                f"--transformer-impl {self.transformer_impl}: without --moe-grouped-gemm its "
                "parameters have the same names"
            )
        if self.pad_for_serving is not None and self.format != "hf":
            raise UserError(f"--pad-for-serving: engines load hf directories, not {self.format}")
        for name in ("report", "push"):
            if getattr(self, name) is not None and self.format != "hf":
                raise UserError(f"--{name} {getattr(self, name)}: only hf directories have a card")
        if self.format == "edited" and self.output.suffix != ".safetensors":
            raise UserError(f"--output {self.output}: edited weights are a .safetensors file")

    @property
    def expert_layout(self) -> ExpertLayout:
        """Of the ``torch`` format."""
        return ExpertLayout.of_flags(
            moe_grouped_gemm=self.moe_grouped_gemm, transformer_impl=self.transformer_impl
        )

    def grid(self, hf: HFConfig) -> LegacyLayout:
        """Of the ``torch`` format.

        Raises:
            UserError: it cannot cut that model.
        """
        check_tensor_parallel(hf, self.tensor_model_parallel_size)
        return LegacyLayout(
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            self.expert_model_parallel_size,
            hf,
        )
