"""Every field of ``config.json`` with every kind of wrong value: refused in one line, or right."""

import json
import shutil

import pytest
import transformers

from megatron_attnedit.attention.registry import student_attention_class
from megatron_attnedit.convert import families
from megatron_attnedit.convert.checked_reader import MANIFEST
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.planning.plan import RunSize, plan
from tests.fuzzing import MISSING, VALUES, changed, refusal
from tests.support.conversions import FAMILIES, make
from tests.support.models import tiny_hf_dir

# Fields of the configuration that shape the model, under transformers' names.
SHAPING = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"),
    *("num_key_value_heads", "tie_word_embeddings"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of each family, its configuration, and the manifest of its import."""
    folder = tmp_path_factory.mktemp("fuzz")
    found = {}
    for family in FAMILIES:
        sizes = {"num_hidden_layers": 2, "dtype": "bfloat16"}
        if family == "qwen3_moe":
            sizes["num_experts"] = 4
        model = tiny_hf_dir(folder / family, family, **sizes)
        config = json.loads((model / "config.json").read_text())
        output = make(model, folder / f"{family}-imported")
        found[family] = model, config, (output / "iter_0000000" / MANIFEST).read_text()
        shutil.rmtree(output)
    return found


def plan_of(model):
    """What ``tools/plan.py`` does, without its output."""
    hf = read_hf_config(model)
    for name in ("mla", "gate_swa") if not hf.qkv_bias else ("gate_swa",):
        student = student_attention_class(name).from_flags({"sliding_window": 8}, hf)
        plan(hf, student, ParallelConfig(), RunSize(world_size=1, seq_length=64), context=64)


def check_right(model, case):
    """What was accepted is read as transformers reads it."""
    hf = read_hf_config(model)
    try:
        theirs = transformers.AutoConfig.from_pretrained(model)
    except Exception:  # transformers refuses it for a field that shapes nothing here
        return
    for name in SHAPING:
        assert getattr(hf, name) == getattr(theirs, name), (case, name)
    heads = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert hf.head_dim == heads, case
    assert hf.rope_theta == theirs.rope_parameters["rope_theta"], case
    assert hf.max_position_embeddings == theirs.max_position_embeddings, case
    if hf.num_experts:
        experts = theirs.num_experts, theirs.num_experts_per_tok, theirs.norm_topk_prob
        assert experts == (hf.num_experts, hf.num_experts_per_tok, hf.norm_topk_prob), case


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field(models, tmp_path, family, request):
    """By default a third of the cases, another one of each family; --full takes all."""
    of = 1 if request.config.getoption("--full") else 3
    model, config, manifest = models[family]
    looked_at = {"model_type", *families.FAMILIES[family].config_fields}
    looked_at |= {"quantization_config", "compression_config"}
    counts, number = {True: 0, False: 0}, list(FAMILIES).index(family)
    for name in sorted({*config, *looked_at}):
        for kind, value in VALUES.items():
            number += 1
            if (value is MISSING and name not in config) or number % of:
                continue
            case = f"{family}: {name} {kind}"
            text = json.dumps(changed(config, name, value))
            (model / "config.json").write_text(text)
            planned = refusal(lambda: plan_of(model))
            if name not in looked_at:  # copied as it is: reading is enough but for a few
                assert planned is None, (case, planned)
                if kind not in ("missing", "object"):
                    continue
            message = refusal(lambda: make(model, tmp_path / "out"))
            counts[message is None] += 1
            assert planned is None or message is not None or "--" in planned, (case, planned)
            if message is None:
                check_right(model, case)
                folder = tmp_path / "out" / "iter_0000000"
                assert (folder / MANIFEST).read_text() == manifest, case
                assert (folder / "hf" / "config.json").read_text() == text, case
                shutil.rmtree(tmp_path / "out")
            else:
                assert "config.json" in message or name in message, (case, message)
            assert not list(tmp_path.iterdir()), case
    assert counts[False] > 200 / of and counts[True] > 20 / of, counts
