"""The last steps of MLA's fit, which look at the output of the whole attention."""

from torch import Tensor

from megatron_attnedit.attention.mla.dims import MLADims
from megatron_attnedit.attention.mla.plain import mla_heads
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.fitting.latent import regress, solve

# Of the correction to the output projection, which is fitted to few tokens for its size: the one
# that is best on samples that are kept from it, one of so many.
OUTPUT_RIDGES = (0.1, 0.01, 1.0, 10.0)
JUDGED = 8


def nearest(
    candidates: list[dict[str, Tensor]],
    inputs: Tensor,
    target: Tensor,
    dims: MLADims,
    angles: Tensor,
    documents: Documents | None,
    qk_norm_eps: float,
) -> dict[str, Tensor]:
    """The candidate whose output is nearest to ``target`` ``[s, c, h]``."""

    def error(weights: dict[str, Tensor]) -> float:
        heads = mla_heads(weights, inputs, dims, angles, documents, qk_norm_eps)
        return (heads @ weights["linear_proj.weight"].t() - target).square().sum().item()

    return min(candidates, key=error)


def corrected(weights: dict[str, Tensor], heads: Tensor, target: Tensor) -> dict[str, Tensor]:
    """With an output projection that makes the most of what the heads give.

    Args:
        weights: Of the layer.
        heads: ``[s, c, n * v]``, what they give.
        target: ``[s, c, h]``, the teacher's output.
    """
    linear_proj = weights["linear_proj.weight"]
    missing = target - heads @ linear_proj.t()
    correction = regress(heads.flatten(0, 1), missing.flatten(0, 1), _best_ridge(heads, missing))
    return {**weights, "linear_proj.weight": linear_proj + correction}


def _best_ridge(inputs: Tensor, targets: Tensor) -> float:
    """With which a regression on most samples comes closest on the others; ``[s, c, ...]`` both."""
    judged = inputs.shape[1] // JUDGED
    if not judged:
        return OUTPUT_RIDGES[0]
    x, y = (t[:, judged:].flatten(0, 1) for t in (inputs, targets))
    gram, cross = x.t() @ x, x.t() @ y

    def error(ridge: float) -> float:
        fitted = solve(gram, cross, ridge)
        return (inputs[:, :judged] @ fitted.t() - targets[:, :judged]).square().sum().item()

    return min(OUTPUT_RIDGES, key=error)
