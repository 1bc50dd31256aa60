"""Why a Hugging Face directory cannot be read: the cause, before anybody lists tensor names."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
SAVE = "save it with transformers' save_pretrained"
# Files that hold a model in a way that is not read, and what to do about it.
OTHER_FORMATS = {
    "model*-of-*.safetensors": "its shards have no model.safetensors.index.json",
    "pytorch_model*.bin": f"pickled weights are not read; {SAVE} as safetensors",
    "adapter_model*": "an adapter without its model; merge it first (merge_and_unload of peft)",
    "consolidated*": "weights in the format of their publisher; convert them to transformers'",
    "*.pth": f"pickled weights are not read; {SAVE} as safetensors",
    "*.pt": f"pickled weights are not read; {SAVE} as safetensors",
    "*.gguf": "a GGUF file is not read; take the model that it was made of",
    "*.safetensors": "expected model.safetensors, or shards and their index",
    "tf_model.h5": f"TensorFlow's weights are not read; {SAVE} from torch",
    "flax_model.msgpack": f"Flax's weights are not read; {SAVE} from torch",
}
QUANTISED = re.compile(
    r"\.(weight_scale(_inv)?|input_scale|qweight|qzeros|scales|g_idx|weight_packed|weight_shape"
    r"|absmax|quant_map|quant_state\..*|SCB|_extra_scale)$"
)
ADAPTER = re.compile(r"\.(lora_[AB]|base_layer|modules_to_save)\b")
FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj|w13|w2)(\.weight)?$")
FUSED = re.compile(r"\.(qkv_proj|qkv|W_pack|query_key_value|c_attn|gate_up_proj)\.(weight|bias)$")
OTHER_HEAD = re.compile(r"^(score|classifier|v_head|value_head|reward_head|qa_outputs)\b")
BIAS = re.compile(r"\.([qkvo]|gate|up|down)_proj\.bias$")
LAYER = re.compile(r"^(?:.*\.)?layers\.(\d{1,9})\.")
EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")


def why_no_weights(directory: Path) -> str:
    """What is there instead of ``model.safetensors``; empty if nothing is."""
    for pattern, why in OTHER_FORMATS.items():
        if found := sorted(path.name for path in directory.glob(pattern)):
            return f"; there is {found[0]}: {why}"
    return ""


def why_no_model(directory: Path) -> str:
    """What is at a path that has neither ``config.json`` nor a Megatron checkpoint."""
    nothing = "neither config.json nor a Megatron checkpoint there"
    if not os.path.lexists(directory):
        return f"{nothing}: no such directory"
    if (directory / "adapter_config.json").is_file():
        return f"{nothing}; it is an adapter: merge it into its model (merge_and_unload of peft)"
    return nothing + (why_no_weights(directory) if directory.is_dir() else "")


def check_counts(hf: HFConfig, names: Iterable[str], where: str) -> None:
    """Compare the numbers of layers and experts with those of the files, before rows are made.

    Args:
        hf: The configuration.
        names: Of the tensors in the files.
        where: Directory, for messages.

    Raises:
        UserError: names the field and both numbers.
    """
    names = list(names)
    for field, pattern in (("num_hidden_layers", LAYER), ("num_experts", EXPERT)):
        found = [(int(match[1]), name) for name in names if (match := pattern.search(name))]
        expected = getattr(hf, field)
        if not found or not expected or max(found)[0] + 1 == expected:
            continue
        last, name = max(found)
        problem = "tensors with unexpected names" if last >= expected else "tensors are missing"
        raise UserError(
            f"{where}: config.json says {field} {expected}, the files hold {last + 1} "
            f"(up to {name}): {problem}"
        )


def why_other_names(expected: Shapes, found: Shapes) -> str:
    """What explains names that do not fit, if anything does; else empty.

    Args:
        expected: Shapes by the names of a supported model.
        found: Shapes by the names in the files.
    """
    missing, unknown = expected.keys() - found.keys(), sorted(found.keys() - expected.keys())
    causes = {
        QUANTISED: "the weights are quantised; expected float32, bfloat16 or float16",
        ADAPTER: "an adapter is in it; merge it first (merge_and_unload of peft)",
        FUSED_EXPERTS: "the experts of a layer are one tensor; expected one for each expert and "
        f"projection: {SAVE}",
        FUSED: f"projections are fused; expected one tensor for each: {SAVE}",
        OTHER_HEAD: "not a language model: it has another head than lm_head",
    }
    for pattern, why in causes.items():
        if name := next((name for name in unknown if pattern.search(name)), None):
            return f"tensor {name}: {why}"
    if not missing:
        name = next((name for name in unknown if BIAS.search(name)), "")
        return f"tensor {name}: biases that this family does not have" if name else ""
    if missing == {"lm_head.weight"}:
        return (
            "tensors are missing: lm_head.weight; config.json says tie_word_embeddings false, so "
            "the output layer has weights of its own"
        )
    return _other_prefix(expected, unknown)


def _other_prefix(expected: Shapes, unknown: Iterable[str]) -> str:
    """A prefix of all names that is not ``model.``."""
    inner = {name.removeprefix("model.") for name in expected if name.startswith("model.layers.")}
    for name in unknown:
        at = name.find("layers.")
        if at >= 0 and name[at:] in inner:
            return (
                f"tensor names begin with {name[:at]!r} instead of 'model.' ({name}); {SAVE} of "
                "the class ...ForCausalLM"
            )
    return ""
