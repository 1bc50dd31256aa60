"""What tools import, for ``tests/tools.py``: Megatron once it is prepared."""

import importlib

import torch

from megatron_attnedit.device import bootstrap

torch.set_num_threads(1)
bootstrap()
for _name in ("evaluate.verify", "export.conversion", "training.run"):
    importlib.import_module(f"megatron_attnedit.{_name}")
