"""Ascend NPUs: load torch_npu, and MindSpeed's adaptor where it is installed."""

import importlib.util
import os
import sys

from megatron_attnedit.errors import UserError


def import_if_installed() -> None:
    """Make ``torch.npu`` available when torch_npu and CANN are.

    MindSpeed's adaptor replaces parts of Megatron-Core at import time, so it has to come before
    the first ``megatron`` import, and it reads ``sys.argv``, which is not meant for it.

    Raises:
        UserError: torch_npu is installed but cannot start, which nearly always means CANN's
            environment script was not sourced.
    """
    if importlib.util.find_spec("torch_npu") is None or "ASCEND_HOME_PATH" not in os.environ:
        return
    try:
        import torch_npu  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"torch_npu does not start (is CANN's set_env.sh sourced?): {error}"
        ) from None
    if importlib.util.find_spec("mindspeed") is not None:
        argv, sys.argv = sys.argv, sys.argv[:1]
        try:
            import mindspeed.megatron_adaptor  # noqa: F401
        finally:
            sys.argv = argv
