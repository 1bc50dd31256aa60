"""What tests of conversions have in common."""

import json

from safetensors.torch import load_file, save_file

from megatron_attnedit.checkpoint.conversion import ConversionConfig, convert
from megatron_attnedit.convert import families
from megatron_attnedit.export.hf import causal_lm_class

FAMILIES = list(families.FAMILIES)


def make(source, output, format="torch_dist", **fields):
    convert(ConversionConfig(source=source, output=output, format=format, **fields))
    return output


def load_export(directory):
    """An exported student in transformers, of this package's classes where it needs them."""
    config = json.loads((directory / "config.json").read_text())
    return causal_lm_class(config).from_pretrained(directory).eval()


def same_files(a, b, *names):
    for name in names or ("model.safetensors", "config.json", "tokenizer_config.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def change(model, edit):
    """Edit the tensors of a directory with one safetensors file."""
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model, **fields):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **fields}))
