"""What a run may be told about the precision of what does not train."""

from dataclasses import dataclass

from megatron_attnedit.errors import UserError
from megatron_attnedit.training.options import option

FROZEN_PRECISIONS = ("bf16", "fp8", "fp8-emulated")
LAYERS = ("mlp", "all")


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Flags are the field names with dashes."""

    keeps_bf16 = False  # does anything need the frozen weights in bf16, too?

    frozen_precision: str = option(
        "bf16",
        "products with frozen weights: bf16 (that is, as everything else), fp8 (NVIDIA Hopper or "
        "newer; needs --bf16), or its numbers in float32 on a device without FP8 (slow)",
        FROZEN_PRECISIONS,
    )
    frozen_precision_layers: str = option(
        "mlp",
        "of the frozen layers, those in fp8: MLPs, or also projections of attentions that are not "
        "edited",
        LAYERS,
    )

    @property
    def in_fp8(self) -> bool:
        """Are frozen linear layers in FP8, at least for a while?"""
        return self.frozen_precision != "bf16"

    def check_precision(self, *, bf16: bool, transformer_impl: str) -> None:
        """FP8 products give bfloat16, and replace Megatron's own layers.

        Raises:
            UserError: names the flag.
        """
        if self.frozen_precision == "fp8" and not bf16:
            raise UserError("--frozen-precision fp8 needs --bf16: FP8 products give bfloat16")
        if self.in_fp8 and transformer_impl != "local":
            raise UserError(
                f"--frozen-precision {self.frozen_precision} does not go with --transformer-impl "
                f"{transformer_impl}: both replace the frozen layers"
            )


@dataclass(frozen=True, kw_only=True)
class ShareInFp8(PrecisionOptions):
    """Stage 2's: FP8 is for its first iterations."""

    keeps_bf16 = True

    frozen_precision_until: float = option(
        0.0,
        "share of the iterations, from the first on, with --frozen-precision fp8; needs "
        "--valid-data-path, on which the teacher in fp8 is measured before",
        minimum=0,
        maximum=1,
    )
    frozen_precision_kl_share: float = option(
        0.1,
        "largest KL divergence of the teacher in fp8 from itself, as a share of the student's at "
        "the start; above it the run is refused",
        above=0,
    )

    def check_share(self, valid_data_path: list[str], feature_matching_weight: float) -> None:
        """A share and a precision other than bf16 go together.

        Raises:
            UserError: names the flag.
        """
        until = f"--frozen-precision-until {self.frozen_precision_until:g}"
        if self.in_fp8 != (self.frozen_precision_until > 0):
            raise UserError(
                f"--frozen-precision {self.frozen_precision}, {until}: stage 2 in fp8 needs a "
                "share above 0, and one in bf16 has none"
            )
        if self.in_fp8 and not valid_data_path:
            raise UserError(f"{until}: needs --valid-data-path, to measure the teacher in fp8")
        if self.in_fp8 and feature_matching_weight:
            raise UserError(
                f"{until} does not go with --feature-matching-weight: it compares hidden states "
                "of bf16"
            )
