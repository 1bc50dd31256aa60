"""Fewer cases in the default run; ``--full`` runs all."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def every_other(*dimensions: Iterable[Any], of: int = 2) -> list[Any]:
    """Cases of ``parametrize``: all combinations, like the fields of a chessboard.

    The black ones only run with ``--full``; the white ones have every value of every dimension,
    also with a board of more colours (``of``), if the other dimensions have so many values
    together. With one dimension its values, tuples, are the cases.
    """
    cases = []
    for combination in itertools.product(*(enumerate(values) for values in dimensions)):
        places, values = zip(*combination, strict=True)
        case = values[0] if len(values) == 1 else values
        cases.append(pytest.param(*case, marks=pytest.mark.full if sum(places) % of else []))
    return cases
