"""The process on the other side of ``dry_run.run``."""

import pickle
import sys
from pathlib import Path

import torch

from megatron_attnedit.device import bootstrap

if __name__ == "__main__":
    torch.set_num_threads(1)
    bootstrap()
    from tests.ascend import scenarios

    function, args = pickle.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_bytes(pickle.dumps(getattr(scenarios, function)(*args)))
