"""The choice of full layers on models that need one layer's long-range attention and no other's."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.data.calibration import attention_inputs
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.lineage import read_lineage
from megatron_attnedit.models.teacher import backbone
from megatron_attnedit.training.full_layers import _fit_once, largest, nll_rises
from tests.support.models import build_tiny_teacher, tiny_data, tiny_hf_dir
from tools import edit_checkpoint

LAYERS = 4
FAR_SIGHTED = 2


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    """Attention does nothing in all layers but one; text drawn from the model shows that."""
    folder = tiny_hf_dir(tmp_path_factory.mktemp("far") / "hf", num_hidden_layers=LAYERS)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for i in range(LAYERS):
        if i != FAR_SIGHTED:
            weights[f"model.layers.{i}.self_attn.o_proj.weight"].zero_()
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def data(teacher_dir, tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data") / "text", teacher_dir)


def test_rise_is_that_of_the_layer_that_looks_far(teacher_dir, data, one_process):
    hf, teacher = build_tiny_teacher(teacher_dir)
    ids = torch.randint(0, hf.vocab_size, (5, 41), generator=torch.Generator().manual_seed(3))
    rises = nll_rises(teacher, ids[:, :-1], ids[:, 1:], 4, hf.vocab_size, batch_size=2)
    assert [i for i, rise in enumerate(rises) if rise != 0] == [FAR_SIGHTED]
    assert nll_rises(teacher, ids[:, :-1], ids[:, 1:], 40, hf.vocab_size) == [0] * LAYERS
    after = nll_rises(teacher, ids[:, :-1], ids[:, 1:], 4, hf.vocab_size, batch_size=5)
    assert after == pytest.approx(rises, abs=1e-5)


def rises_by_whole_passes(teacher, tokens, labels, window, sinks, vocab_size, batch_size):
    """The definition: the whole model once for each layer that slides."""
    from megatron_attnedit.training.full_layers import _loss, _sliding

    def nll():
        total = 0.0
        for ids, after in zip(tokens.split(batch_size), labels.split(batch_size), strict=True):
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            total += _loss(teacher, backbone(teacher, ids, positions), after, vocab_size)
        return total / labels.numel()

    with torch.no_grad():
        whole, found = nll(), []
        for layer in teacher.decoder.layers:
            with _sliding(layer, window, sinks):
                found.append(nll() - whole)
    return found


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_passes_that_begin_in_the_middle_give_the_same(family, sinks, tmp_path, one_process):
    hf, teacher = build_tiny_teacher(tiny_hf_dir(tmp_path / "hf", family, num_hidden_layers=LAYERS))
    ids = torch.randint(0, hf.vocab_size, (5, 41), generator=torch.Generator().manual_seed(3))
    tokens, labels = ids[:, :-1], ids[:, 1:]
    expected = rises_by_whole_passes(teacher, tokens, labels, 4, sinks, hf.vocab_size, 2)
    layers = list(teacher.decoder.layers)
    calls = count_calls(layers)
    rises = nll_rises(teacher, tokens, labels, 4, hf.vocab_size, sink_tokens=sinks, batch_size=2)
    assert rises == expected and min(map(abs, rises)) > 1e-4
    # Three batches: the layers once, then from each layer on.
    assert [calls[layer] for layer in layers] == [3 * (1 + i + 1) for i in range(LAYERS)]


def count_calls(layers):
    calls = dict.fromkeys(layers, 0)

    def count(layer, *args):
        calls[layer] += 1

    for layer in layers:
        layer.register_forward_hook(count)
    return calls


def test_packed_documents_are_measured_one_at_a_time(teacher_dir, one_process):
    """Labels and tokens are the same, so only what tokens see makes a difference."""
    hf, teacher = build_tiny_teacher(teacher_dir)
    ids = torch.randint(0, hf.vocab_size, (8, 21), generator=torch.Generator().manual_seed(3))
    apart = ids[:, :-1], ids[:, 1:]
    packed = [t.reshape(2, 80) for t in apart]
    numbers = torch.arange(4, dtype=torch.int32).repeat_interleave(20)
    documents = Documents.of_samples([numbers] * 2, [None] * 2)

    # The fit ends at the nearest of a few candidates.
    for fits, near in ((False, 1e-5), (True, 5e-4)):

        def rises(tokens, documents, batch_size, fits=fits):
            fit = _fit_once(hf, 4) if fits else None
            given = {"fit": fit, "documents": documents, "batch_size": batch_size}
            return nll_rises(teacher, *tokens, 4, hf.vocab_size, **given)

        expected = rises(apart, None, 8)
        assert rises(packed, documents, 2) == pytest.approx(expected, abs=near)
        assert rises(packed, None, 2) != pytest.approx(expected, abs=2 * near)


def test_inputs_of_packed_documents_are_those_of_each(teacher_dir, one_process):
    hf, teacher = build_tiny_teacher(teacher_dir)
    ids = torch.randint(0, hf.vocab_size, (8, 20), generator=torch.Generator().manual_seed(3))
    numbers = torch.arange(4, dtype=torch.int32).repeat_interleave(20)
    documents = Documents.of_samples([numbers] * 2, [None] * 2)
    expected = attention_inputs(teacher, ids)
    found = attention_inputs(teacher, ids.reshape(2, 80), documents, batch_size=1)
    leaking = attention_inputs(teacher, ids.reshape(2, 80))
    for layer, apart in expected.items():
        packed = [t[layer].transpose(0, 1).reshape(8, 20, -1) for t in (found, leaking)]
        torch.testing.assert_close(packed[0], apart.transpose(0, 1), rtol=1e-4, atol=1e-4)
        assert layer <= FAR_SIGHTED or (packed[1] - packed[0]).abs().max() > 1e-2


def test_logits_are_fitted_once_and_used(teacher_dir, one_process):
    """By the first batch's input of each layer; they change the loss of the one that matters."""
    hf, teacher = build_tiny_teacher(teacher_dir)
    ids = torch.randint(0, hf.vocab_size, (6, 41), generator=torch.Generator().manual_seed(3))
    fitted, fit = [], _fit_once(hf, 4)

    def noted(layer, *sample):
        fitted.append((layer.layer_number, fit(layer, *sample)))
        return fitted[-1][1]

    arguments = teacher, ids[:, :-1], ids[:, 1:], 4, hf.vocab_size
    rises = nll_rises(*arguments, fit=noted, batch_size=3)
    assert len(fitted) == 2 * LAYERS
    assert all(one is other for (_, one), (_, other) in zip(fitted[:4], fitted[4:], strict=True))
    assert [i for i, rise in enumerate(rises) if rise != 0] == [FAR_SIGHTED]
    without = nll_rises(*arguments, batch_size=3)
    assert abs(rises[FAR_SIGHTED] - without[FAR_SIGHTED]) > 1e-4


def test_rise_is_that_of_the_loss(teacher_dir, one_process):
    """Against transformers with the same window in the one layer that matters."""
    from transformers import AutoModelForCausalLM

    hf, teacher = build_tiny_teacher(teacher_dir)
    ids = torch.randint(0, hf.vocab_size, (3, 33), generator=torch.Generator().manual_seed(5))
    rises = nll_rises(teacher, ids[:, :-1], ids[:, 1:], 6, hf.vocab_size)
    losses = []
    for window in (None, 6):
        model = AutoModelForCausalLM.from_pretrained(
            teacher_dir,
            attn_implementation="eager",
            layer_types=["sliding_attention" if window else "full_attention"] * LAYERS,
            sliding_window=window,
            use_sliding_window=bool(window),
        )
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    assert rises[FAR_SIGHTED] == pytest.approx(losses[1] - losses[0], rel=1e-3)
    assert abs(rises[FAR_SIGHTED]) > 0.01


def run(monkeypatch, *flags):
    given = ["edit_checkpoint.py", "--student-attention", "gate_swa", "--full-layers", "auto"]
    monkeypatch.setattr(sys, "argv", [*given, *map(str, flags)])
    edit_checkpoint.main()


def test_the_tool_keeps_that_layer(teacher_dir, data, tmp_path, monkeypatch, capsys):
    flags = ["--teacher", teacher_dir, "--save", tmp_path / "edit", "--sliding-window", 4]
    flags += ["--calibration-data-path", data, "--seq-length", 63, "--calibration-tokens", 2048]
    run(monkeypatch, *flags)
    lineage = read_lineage(next((tmp_path / "edit").glob("iter_*")))
    assert lineage.student_attention["full_layers"] == [FAR_SIGHTED]
    scores = lineage.recipe["full_layer_scores"]
    assert len(scores) == LAYERS and scores[FAR_SIGHTED] == max(scores) > 0.01
    assert json.dumps(scores)
    assert f"full layers: {FAR_SIGHTED}" in capsys.readouterr().err


@pytest.mark.full
def test_the_tool_keeps_documents_apart(teacher_dir, data, tmp_path, monkeypatch):
    flags = ["--teacher", teacher_dir, "--sliding-window", 4, "--calibration-data-path", data]
    flags += ["--seq-length", 63, "--calibration-tokens", 512]
    found = {}
    for name, masks in (("whole", []), ("apart", ["--reset-attention-mask"])):
        run(monkeypatch, *flags, "--save", tmp_path / name, *masks)
        folder = next((tmp_path / name).glob("iter_*"))
        found[name] = read_lineage(folder).recipe
    assert found["apart"]["reset_attention_mask"] and "reset_attention_mask" not in found["whole"]
    scores = [found[name]["full_layer_scores"][FAR_SIGHTED] for name in ("whole", "apart")]
    assert scores[0] != pytest.approx(scores[1], rel=1e-2)


def test_bad_input(teacher_dir, data, tmp_path, monkeypatch):
    flags = ["--teacher", teacher_dir, "--save", tmp_path / "edit"]
    with pytest.raises(UserError, match="--full-layers auto needs --calibration-data-path"):
        run(monkeypatch, *flags, "--init", "random")
    with pytest.raises(UserError, match="--seq-length 63: .* more than the window 128"):
        run(monkeypatch, *flags, "--calibration-data-path", data, "--seq-length", 63)
    with pytest.raises(UserError, match="--seq-length 63: .* window 60 and 3 sink tokens"):
        sizes = ["--seq-length", 63, "--sliding-window", 60, "--sink-tokens", 3]
        run(monkeypatch, *flags, "--calibration-data-path", data, *sizes)


def test_largest():
    assert largest([0.1, 3.0, -1.0, 2.0], 2) == [1, 3]
    assert largest([1.0, 1.0, 1.0], 1) == [2]
