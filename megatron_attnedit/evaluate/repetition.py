"""How much a model repeats itself."""

from torch import Tensor

NGRAM = 4


def repetition_rate(generated: Tensor) -> float:
    """Fraction of 4-grams that their own continuation had before.

    Args:
        generated: [n, t] token ids, t at least 4.

    Returns:
        Over all n * (t - 3) 4-grams; 0 where none occurs twice in a row of ``generated``.
    """
    rows = generated.unfold(1, NGRAM, 1).tolist()
    repeated = sum(len(row) - len({tuple(ngram) for ngram in row}) for row in rows)
    return repeated / sum(map(len, rows))
