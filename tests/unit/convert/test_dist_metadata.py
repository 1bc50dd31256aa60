"""Metadata of any Python are read, and nothing else is."""

import enum
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from megatron_attnedit.convert.dist_metadata import read_metadata
from megatron_attnedit.errors import UserError


class OlderPickler(pickle.Pickler):
    """Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) write enumerations so."""

    def reducer_override(self, thing):
        if isinstance(thing, enum.Enum):
            return getattr, (type(thing), thing.name)
        return NotImplemented


class Attribute:
    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def metadata(planner_data=None):
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))
    tensor = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([3]), [chunk])
    return Metadata({"w": tensor}, planner_data, {})


@pytest.mark.parametrize("pickler", [pickle.Pickler, OlderPickler])
def test_any_python(tmp_path, pickler):
    expected = metadata(SavePlan([WriteItem("w", WriteItemType.SHARD)]))
    content = io.BytesIO()
    pickler(content).dump(expected)
    (tmp_path / ".metadata").write_bytes(content.getvalue())
    assert read_metadata(tmp_path) == expected


@pytest.mark.parametrize(
    ("owner", "name"), [(torch.Size, "__class__"), (WriteItemType, "mro"), (Metadata, "__init__")]
)
def test_no_other_attribute(tmp_path, owner, name):
    evil = pickle.dumps(metadata(Attribute(owner, name)))
    (tmp_path / ".metadata").write_bytes(evil)
    with pytest.raises(UserError, match="not a distributed checkpoint"):
        read_metadata(tmp_path)
