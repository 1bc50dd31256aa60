"""A teacher of Transformer Engine's layers against the local one: names, values, gradients, files.

Here on a stand-in of its layers (``tests.support.te_stand_in``), in a process of its own; on an
accelerator on the real ones:

python -m pytest -m gpu tests/numerics/test_transformer_engine.py
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_attnedit.convert.legacy_checkpoint import _load
from megatron_attnedit.core_attention.backends import attention_backend, te
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.teacher import backbone, global_params, vocab_parallel_logits
from megatron_attnedit.models.transformer_engine import check_transformer_impl
from megatron_attnedit.training.loop import train
from megatron_attnedit.training.recipe import Stage2Recipe
from megatron_attnedit.training.run import prepare
from megatron_attnedit.training.setup import load_teacher, start_processes, stop_processes
from tests.numerics.test_gpu import HEADS, compare_runs, compare_with_reference, write_inputs
from tests.support.attempts import metrics
from tests.support.conversions import make, same_files
from tests.support.inputs import make_inputs
from tests.support.inputs import recipe as small_recipe
from tests.support.models import tiny_hf_dir, tokens

TE = "transformer_engine"
# Family, type, grouped experts, and the largest relative difference of a tensor's norm.
CASES = [
    ("qwen3", torch.float32, False, 1e-4),
    ("qwen3_moe", torch.float32, False, 1e-4),
    ("qwen3_moe", torch.bfloat16, True, 2e-2),
]
needs_te = pytest.mark.skipif(not te.is_installed(), reason="Transformer Engine is not installed")


def test_grouped_experts_on_stand_ins(tmp_path):
    on_stand_ins(f"compare_all({str(tmp_path)!r}, cases.CASES[2:])")


@pytest.mark.full
def test_on_stand_ins(tmp_path):
    on_stand_ins(f"compare_all({str(tmp_path)!r}, cases.CASES[:2])")


@pytest.mark.full
def test_a_run_goes_from_one_to_the_other_on_stand_ins(tmp_path):
    on_stand_ins(f"train_on_both({str(tmp_path)!r})")


def on_stand_ins(call):
    """Megatron-Core looks for Transformer Engine once, when it is imported."""
    code = (
        "import tests.support.te_stand_in\n"
        "from megatron_attnedit.device import bootstrap; bootstrap()\n"
        f"from tests.numerics import test_transformer_engine as cases; cases.{call}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


@pytest.fixture
def nothing_known():
    te.is_installed.cache_clear()
    yield
    te.is_installed.cache_clear()


def test_refused_where_it_is_missing(monkeypatch, nothing_known):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    for flag, check in (
        ("--transformer-impl transformer_engine", lambda: check_transformer_impl(TE)),
        ("--attention-backend te", lambda: attention_backend("te")),
    ):
        message = f"^{flag}: Transformer Engine is not installed for this device$"
        with pytest.raises(UserError, match=message):
            check()


def test_one_that_cannot_be_imported(monkeypatch, tmp_path, caplog, nothing_known):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('libx.so: gone')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    with pytest.raises(UserError, match="is not installed for this device"):
        check_transformer_impl(TE)
    assert "cannot be imported: libx.so: gone" in caplog.text


def test_an_unknown_implementation():
    with pytest.raises(UserError, match="expected one of local, transformer_engine"):
        check_transformer_impl("apex")


@pytest.mark.gpu
@needs_te
@pytest.mark.parametrize("window", [None, 2, 128, 5000])
@pytest.mark.parametrize("length", [63, 1000])
@pytest.mark.parametrize("heads", HEADS)
def test_attention(heads, length, window):
    n, g, d, dv = heads
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, n, length, d), (2, g, length, d), (2, g, length, dv)]
    qkv = [torch.randn(s, device="cuda", generator=generator).bfloat16() for s in shapes]
    compare_with_reference("te", qkv, window, torch.bfloat16)


@pytest.mark.gpu
@needs_te
@pytest.mark.parametrize("case", range(len(CASES)))
def test_values_and_gradients(tmp_path, case):
    accelerator = start_processes(ParallelConfig())
    try:
        compare(tmp_path, *CASES[case], accelerator)
    finally:
        stop_processes()


@pytest.mark.gpu
@needs_te
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "family, flags", [("qwen3", ["--enable-cuda-graph"]), ("qwen3_moe", ["--moe-grouped-gemm"])]
)
def test_a_run_equals_the_local_one_on_a_cpu(tmp_path, family, flags, stage):
    inputs = write_inputs(tmp_path / "inputs", family)
    flags = ["--bf16", "--transformer-impl", TE, *flags]
    compare_runs(inputs, tmp_path, "mla", stage, flags, 2e-2)


@pytest.mark.gpu
@needs_te
def test_a_run_goes_from_one_to_the_other(tmp_path):
    train_on_both(str(tmp_path))


def compare_all(folder, cases):
    """In one process on the stand-ins."""
    accelerator = start_processes(ParallelConfig())
    for number, case in enumerate(cases):
        place = Path(folder) / str(number)
        place.mkdir()
        compare(place, *case, accelerator)
    stop_processes()


def compare(folder, family, dtype, grouped, bar, accelerator):
    """The same model twice, loaded from Hugging Face files; then from both Megatron formats."""
    real = accelerator.device.type != "cpu"
    fields = {"num_hidden_layers": 2, "dtype": str(dtype).removeprefix("torch.")}
    if real:
        bar = max(bar, 1e-2)  # its float32 products are of TF32
        if family == "qwen3_moe":  # else rounding sends tokens to other experts
            fields["num_experts_per_tok"] = 8
    source = tiny_hf_dir(folder / "hf", family, **fields)
    flags = {"moe_grouped_gemm": grouped}

    def load(path, impl):
        teacher = load_teacher(
            str(path), ParallelConfig(), dtype, accelerator, transformer_impl=impl, **flags
        )
        return teacher.chunks[0]

    local, theirs = load(source, "local"), load(source, TE)
    check_classes(theirs, grouped=grouped)
    found, expected = values_and_gradients(theirs), values_and_gradients(local)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        difference = (found[key].float() - value.float()).norm()
        assert difference <= bar * value.float().norm() + 1e-6, (key, difference)
    weights = dict(theirs.named_parameters())
    again = load(make(source, folder / "torch_dist", "torch_dist"), TE)
    same_tensors(dict(again.named_parameters()), weights)
    impl = TE if grouped else "local"
    files = make(source, folder / "torch", "torch", transformer_impl=impl, **flags)
    (file,) = files.rglob("model_optim_rng.pt")
    held = _load(file, mmap=False)["model"]
    same_tensors({key: held[key].to(accelerator.device) for key in held}, weights)
    same_files(make(files, folder / "back", "hf"), source)


def same_tensors(found, expected):
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def check_classes(model, *, grouped):
    """Norms, MLP and experts are Transformer Engine's, and attention is not."""
    import transformer_engine.pytorch as te_pytorch
    from megatron.core.extensions import transformer_engine as mcore_s

    layer = model.decoder.layers[0]
    for norm in (layer.input_layernorm, layer.pre_mlp_layernorm, model.decoder.final_layernorm):
        assert isinstance(norm, te_pytorch.RMSNorm)
    mlp = layer.mlp
    if model.config.num_moe_experts:
        mlp = mlp.experts if grouped else mlp.experts.local_experts[0]
    column, row = mcore_s.TEColumnParallelLinear, mcore_s.TERowParallelLinear
    if grouped:
        column, row = mcore_s.TEColumnParallelGroupedLinear, mcore_s.TERowParallelGroupedLinear
        names = dict(mlp.named_parameters())
        assert [name for name in names if name.startswith("linear_fc2")] == [
            f"linear_fc2.weight{i}" for i in range(model.config.num_moe_experts)
        ]
    assert type(mlp.linear_fc1) is column and type(mlp.linear_fc2) is row
    assert not isinstance(layer.self_attention.linear_qkv, te_pytorch.Linear)


def values_and_gradients(model):
    """Logits, and the gradients of all weights, experts one by one."""
    model.requires_grad_(True)
    device = next(model.parameters()).device
    ids = tokens(2, 33).to(device)
    positions = torch.arange(33, device=device).expand_as(ids)
    logits = vocab_parallel_logits(model, backbone(model, ids, positions))
    weight = torch.linspace(-1, 1, logits.numel(), device=device).view_as(logits)
    (logits.float() * weight).sum().backward()
    for param in model.parameters():
        if param.grad is None:  # an expert without a token
            param.grad = torch.zeros_like(param)
        param.data, param.weight = param.grad, param.data
    result = {name: grad.clone() for name, grad in global_params(model)}
    for param in model.parameters():
        param.data = param.weight
        param.grad = None
    return {"logits": logits.detach(), **result}


def train_on_both(folder):
    """Everything is trained on Transformer Engine's layers, and continues on the local ones."""
    inputs = make_inputs(Path(folder) / "inputs", "qwen3_moe", num_hidden_layers=2)
    losses = {}
    for first in ("local", TE):
        save = Path(folder) / first
        for impl, iterations in ((first, 2), ("local", 4)):
            recipe = small_recipe(
                Stage2Recipe,
                inputs,
                "gate_swa",
                save,
                bf16=True,
                trainable="all",
                moe_grouped_gemm=True,
                transformer_impl=impl,
                train_iters=iterations,
                lr_decay_style="constant",
                log_interval=1,
            )
            try:
                train(prepare(recipe))
            finally:
                stop_processes()
        losses[first] = [line["loss"] for line in metrics(save)]
    assert len(losses[TE]) == 4
    assert losses[TE] == pytest.approx(losses["local"], rel=2e-2)
