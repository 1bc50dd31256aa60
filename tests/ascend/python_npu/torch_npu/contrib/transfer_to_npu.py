"""``torch.cuda`` becomes ``torch.npu``; device arguments are translated by ``NpuMode``."""

import torch

torch.cuda = torch.npu
torch.Tensor.cuda = lambda self, *args, **kwargs: self.to("npu")
