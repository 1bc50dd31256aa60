"""Files in a later pickle protocol: the numbers are read, and nothing is run."""

import argparse
import collections
import os
import pickle

import pytest
import torch

from megatron_attnedit.convert.plain_pickle import load_plain


class Code:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("mmap", [False, True])
def test_what_a_converter_writes(tmp_path, protocol, mmap):
    weight = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    args = argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16)
    model = collections.defaultdict(dict, {"weight": weight, "transposed": weight.t()})
    content = {"args": args, "model": model}
    torch.save(content, tmp_path / "file.pt", pickle_protocol=protocol)
    if protocol == 2:  # torch reads no defaultdict of dict there
        torch.save({**content, "model": dict(model)}, tmp_path / "file.pt")
    found = load_plain(tmp_path / "file.pt", mmap=mmap)
    assert vars(found["args"]) == vars(args)
    assert torch.equal(found["model"]["weight"], weight)
    assert torch.equal(found["model"]["transposed"], weight.t())


@pytest.mark.parametrize(
    "call",
    [
        (os.mkdir, ("made",)),
        (eval, ("__import__('os').mkdir('made')",)),
        (torch.load, ("other.pt",)),
        (getattr, (dict, "fromkeys")),
        (collections.defaultdict, (os.getcwd,)),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_not_run(tmp_path, monkeypatch, protocol, call):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Code(*call)}, "file.pt", pickle_protocol=protocol)
    with pytest.raises(pickle.UnpicklingError, match="GLOBAL|weights_only"):
        load_plain(tmp_path / "file.pt", mmap=False)
    assert not (tmp_path / "made").exists()


def test_another_file_of_that_protocol(tmp_path):
    (tmp_path / "file.pt").write_bytes(pickle.dumps({"model": Code(os.mkdir, ("made",))}, 4))
    with pytest.raises(pickle.UnpicklingError):
        load_plain(tmp_path / "file.pt", mmap=False)
