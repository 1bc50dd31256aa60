"""How a budget for the cache is cut into latent and rotary key: the sizes, and the choice.

A cut is judged by the error of whole layers that are fitted with it, on calibration text that the
fit has not seen: what the latent lacks and what the rotary part lacks count as they do in the
layer's output.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from megatron_attnedit.attention.mla.served_sizes import HEADS, LATENT_AND_ROTARY_OF_ALL
from megatron_attnedit.attention.plain import teacher_output
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.errors import UserError

# Rotary parts that are tried; of heads that are served as they are, only the one that is.
ROTARY_SIZES = (16, 32, 48, 64)
SMALLEST_LATENT = 16
# Of these many layers, evenly spread, the errors are added up.
LAYERS = 4
# One calibration sample in as many is kept from the fit, to judge it.
JUDGED = 8


class Cut(NamedTuple):
    """Numbers per token and layer."""

    latent: int
    rotary: int


Layer = tuple[Mapping[str, Tensor], Tensor]
# Inputs of a layer, and the documents of their samples.
Sample = tuple[Tensor, Documents | None]
# From a cut, the index of a layer, its teacher's weights and a sample to a fit: outputs of samples.
FitLayer = Callable[[Cut, int, Mapping[str, Tensor], Sample], Callable[[Sample], Tensor]]


def cuts_of(teacher: HFConfig, budget: float, rotary: int | None = None) -> list[Cut]:
    """Cuts that stay within a budget.

    Args:
        teacher: Its configuration.
        budget: Of the teacher's cache, a share.
        rotary: The rotary part, if it is given.

    Raises:
        UserError: no cut does.
    """
    head = teacher.head_dim
    numbers = 2 * teacher.num_key_value_heads * head
    most = int(budget * numbers)
    sizes = [rotary] if rotary else [size for size in ROTARY_SIZES if size <= head]
    served = [heads.qk_pos_emb_head_dim for heads in HEADS[:1] if heads.qk_head_dim == head]
    if served and rotary in (None, *served):
        fitting = [size for size in LATENT_AND_ROTARY_OF_ALL if size <= most]
        if not fitting:
            least = min(LATENT_AND_ROTARY_OF_ALL)
            raise UserError(
                f"--kv-budget {budget}: the smallest cache that is served has {least} numbers, "
                f"{least / numbers:.3f} of the teacher's {numbers}"
            )
        most, sizes = max(fitting), served
    cuts = [Cut(most - size, size) for size in sizes if most - size >= SMALLEST_LATENT]
    if not cuts:
        raise UserError(
            f"--kv-budget {budget}: {most} of {numbers} numbers have no room for a latent of "
            f"{SMALLEST_LATENT} beside a rotary part of {min(sizes)}"
        )
    return cuts


def judging_layers(count: int) -> range:
    """Indices of the layers of a model of ``count`` that cuts are judged on."""
    return range(0, count, max(1, count // LAYERS))


def best_cut(
    cuts: Sequence[Cut],
    layers: Mapping[int, Layer],
    teacher: HFConfig,
    fit: FitLayer,
    documents: Documents | None = None,
) -> tuple[Cut, dict[Cut, float]]:
    """The cut with the smallest error, and the errors of all, as shares of the outputs' energy.

    Args:
        cuts: To choose among.
        layers: Of each layer, by 0-based index, the teacher's weights and what enters it,
            ``[s, c, h]``.
        teacher: Its configuration.
        fit: Fits a layer with a cut.
        documents: Of the c samples; None: all tokens of a sample see each other.
    """
    errors = dict.fromkeys(cuts, 0.0)
    for i, (weights, inputs) in layers.items():
        count = inputs.shape[1]
        judged = max(1, count // JUDGED)
        fitted, seen = (
            (inputs[:, which].float(), documents and documents.samples(which))
            for which in (slice(max(1, count - judged)), slice(count - judged, None))
        )
        target = teacher_output(seen[0], weights, teacher, seen[1])
        for cut in cuts:
            missed = fit(cut, i, weights, fitted)(seen) - target
            share = missed.square().sum() / target.square().sum()
            errors[cut] += share.item() / len(layers)
    return min(errors, key=errors.__getitem__), errors
