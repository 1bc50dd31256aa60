"""What Megatron-Core says to programmers stays off the screen; everything else reaches it."""

import importlib
import inspect
import logging
import warnings

import megatron.core
import pytest

from megatron_attnedit.device.quiet import ADVICE, CALLS, quiet_megatron
from tests.support.other_core import CURRENT


@pytest.mark.parametrize("name", ADVICE)
def test_advice_is_dropped(name, caplog):
    quiet_megatron()
    logger = logging.getLogger(name)
    logger.warning("%s and more", ADVICE[name])
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    if megatron.core.__version__ == CURRENT:  # it still says so, there
        source = inspect.getsource(importlib.import_module(name))
        assert ADVICE[name] in source


def test_warnings_about_its_calls_are_dropped():
    said = [
        "`torch.distributed.reduce_scatter_tensor` is deprecated. Please use another",
        "`load_state_dict` is deprecated and will be removed",
        "The argument order of load has been changed.",
        "torch.distributed is disabled, unavailable or uninitialized, assuming",
    ]
    assert len(said) == len(CALLS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_megatron()
        for text in (*said, "`torch.save` is deprecated"):
            warnings.warn(text, FutureWarning, stacklevel=1)
    assert [str(entry.message) for entry in caught] == ["`torch.save` is deprecated"]
