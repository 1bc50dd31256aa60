"""Weight gradients that go straight into the main gradients are the ones autograd would give."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.input_linear import InputColumnParallelLinear
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.device import add_weight_gradient
from megatron_attnedit.distill.kl import chunked_divergence
from megatron_attnedit.models.config import transformer_config
from megatron_attnedit.models.parallel_layout import ParallelConfig
from tests.numerics.test_student_matches_reference import rotary_table
from tests.support import processes
from tests.support.models import start_megatron, tiny_hf_dir

LENGTH, BATCH = 13, 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_to_what_is_there(dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(31, n, generator=generator).to(dtype) for n in (5, 7))
    main_grad = torch.randn(7, 5, generator=generator)
    expected = main_grad.double() + grad.double().t() @ x.double()
    add_weight_gradient(x, grad, main_grad)
    bar = 1e-6 if dtype == torch.float32 else 1e-2
    assert (main_grad - expected).norm() <= bar * expected.norm()


def gradients(hf_dir, student_class, flags, fusion, input_wants_gradient, grid):
    """Main gradients after two micro-batches, and the input's gradient."""
    start_megatron(grid.get("tensor_model_parallel_size", 1))
    hf = read_hf_config(hf_dir)
    config = transformer_config(
        hf, ParallelConfig(**grid), torch.float32, gradient_accumulation_fusion=fusion
    )
    student = student_class.from_flags(flags, hf)
    attention = build_module(
        student.spec(config, attention_backend="auto"), config=config, layer_number=1
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in attention.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), Holder(config, attention)
    )
    ranks = grid.get("tensor_model_parallel_size", 1) if config.sequence_parallel else 1
    rank = parallel_state.get_tensor_model_parallel_rank()
    inputs = []
    for _ in range(2):
        x = torch.randn(LENGTH * ranks, BATCH, hf.hidden_size, generator=generator)
        x = x.chunk(ranks)[rank if ranks > 1 else 0].clone().requires_grad_(input_wants_gradient)
        out, _ = attention(x, None, rotary_pos_emb=rotary_table(hf, LENGTH * ranks))
        out.sin().sum().backward()
        inputs.append(x.grad)
    return {n: p.main_grad.clone() for n, p in model.module.named_parameters()}, inputs


class Holder(MegatronModule):
    def __init__(self, config, attention):
        super().__init__(config)
        self.attention = attention


@pytest.mark.parametrize("input_wants_gradient", [False, True])
@pytest.mark.parametrize(
    "grid",
    [
        {},
        {"tensor_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ],
    ids=["one process", "TP2", "TP2 SP"],
)
@pytest.mark.parametrize("student", ["mla", "gate_swa"])
def test_with_and_without_fusion(tmp_path, student, grid, input_wants_gradient):
    kind, flags = {
        "mla": (MLA, {}),
        "gate_swa": (GateSWA, {"sliding_window": 4, "full_layers": "none"}),
    }[student]
    hf_dir = tiny_hf_dir(tmp_path / "hf")
    size = grid.get("tensor_model_parallel_size", 1)
    runs = [
        processes.run(size, gradients, hf_dir, kind, flags, fusion, input_wants_gradient, grid)
        for fusion in (False, True)
    ]
    for (plain, plain_x), (fused, fused_x) in zip(*runs, strict=True):
        for name, expected in plain.items():
            assert expected.norm() > 0, name
            torch.testing.assert_close(fused[name], expected, rtol=1e-5, atol=1e-5, msg=name)
        for expected, actual in zip(plain_x, fused_x, strict=True):
            assert (expected is None) == (not input_wants_gradient)
            torch.testing.assert_close(actual, expected)


def test_no_gradient_of_an_input_that_wants_none(one_process, tmp_path, monkeypatch):
    """mcore's own linear would compute it."""
    hf = read_hf_config(tiny_hf_dir(tmp_path / "hf"))
    config = transformer_config(hf, ParallelConfig(), torch.float32)
    linear = InputColumnParallelLinear(
        64, 48, config=config, init_method=torch.nn.init.normal_, bias=True, skip_bias_add=False
    )
    x = torch.randn(5, 2, 64)
    products = []
    with Products(products):
        linear(x)[0].sum().backward()
    assert len(products) == 2  # the output, and the weight's gradient
    with Products(products):
        linear(x.requires_grad_())[0].sum().backward()
    assert len(products) == 2 + 3


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.found.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied", [False, True])
def test_divergence_adds_to_the_main_gradient(one_process, tied):
    generator = torch.Generator().manual_seed(0)
    hidden, target = (torch.randn(9, 6, generator=generator) for _ in range(2))
    weight = torch.randn(20, 6, generator=generator).requires_grad_()
    group = parallel_state.get_tensor_model_parallel_group()

    def run(**options):
        hidden.grad, weight.grad = None, None
        hidden.requires_grad_()
        loss = chunked_divergence(
            hidden,
            weight,
            target,
            weight.detach() * 0.7,
            torch.ones(9),
            vocab_size=19,
            group=group,
            chunk_tokens=4,
            **options,
        )
        loss.backward()
        return hidden.grad.clone(), weight.grad.clone()

    expected_hidden, expected_weight = run()
    weight.main_grad = torch.ones(20, 6)
    weight.zero_out_wgrad = tied
    found_hidden, left = run(gradient_accumulation_fusion=True)
    torch.testing.assert_close(found_hidden, expected_hidden)
    torch.testing.assert_close(weight.main_grad - 1, expected_weight)
    assert weight.grad_added_to_main_grad
    if tied:  # autograd adds the embedding's own gradient to this one
        assert (left == 0).all()


def test_divergence_refuses_a_scaled_loss(one_process):
    weight = torch.randn(8, 4).requires_grad_()
    weight.main_grad = torch.zeros(8, 4)
    loss = chunked_divergence(
        torch.randn(3, 4),
        weight,
        torch.randn(3, 4),
        weight.detach(),
        torch.ones(3),
        vocab_size=8,
        group=parallel_state.get_tensor_model_parallel_group(),
        gradient_accumulation_fusion=True,
    )
    with pytest.raises(RuntimeError):
        (loss * 2).backward()
