"""Processes that begin where torch and Megatron are imported: forked from one that did only that.

A start takes a fraction of a second instead of several. (A process that has trained cannot be
forked: autograd's threads are not there any more.)
"""

import importlib
import multiprocessing

import torch

from megatron_attnedit.device import bootstrap

torch.set_num_threads(1)
bootstrap()
for _name in ("checkpoint.verify", "checkpoint.conversion", "training.run"):
    importlib.import_module(f"megatron_attnedit.{_name}")

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.support.forked"])
