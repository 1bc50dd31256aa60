"""Stage 1: what it leaves out changes nothing, and gradients are divided as written."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_attnedit.attention.registry import student_attention_class
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.distill.layerwise import LayerwiseDistillation
from megatron_attnedit.training import building
from tests.support import processes
from tools.benchmark.workload import Workload, build_training


def test_each_layer_is_divided_by_its_own_energy():
    attentions = nn.ModuleDict({str(i): nn.Linear(5, 3) for i in (0, 2, 3)})
    attentions["2"].bias.requires_grad_(False)
    attentions["3"].requires_grad_(False)
    sums = torch.tensor([[9.0, 4.0], [9.0, 5.0], [9.0, 7.0], [9.0, 0.0]])
    expected = {}
    for name, param in attentions.named_parameters():
        param.main_grad = torch.randn(param.shape)
        layer = int(name.split(".")[0])
        divisor = sums[layer, 1] if param.requires_grad else 1
        expected[name] = param.main_grad / divisor
    LayerwiseDistillation.normalise_gradients(SimpleNamespace(attentions=attentions), sums)
    for name, param in attentions.named_parameters():
        torch.testing.assert_close(param.main_grad, expected[name])


def an_iteration(hf_dir, name, flags, to_the_end):
    """Loss, gradients, and the layers whose MLP the teacher computed."""
    hf = read_hf_config(hf_dir)
    student = student_attention_class(name).from_flags(flags, hf)
    built = build_training(
        Workload(hf=hf, student=student, stage=1, seq_length=32, micro_batches=2)
    )
    (module,) = (model.module for model in built.models)
    if to_the_end:
        module._last = None
    computed = set()
    for i, layer in enumerate(module.teacher.decoder.layers):
        layer.mlp.register_forward_hook(lambda *args, i=i: computed.add(i))
    loss = built.step()
    return loss, {n: p.main_grad.clone() for n, p in module.attentions.named_parameters()}, computed


@pytest.mark.parametrize(
    ("name", "flags", "needed"),
    [("mla", {}, {0, 1, 2}), ("gate_swa", {"sliding_window": 8, "full_layers": "0,3"}, {0, 1})],
)
def test_the_teacher_stops_where_nothing_is_left_to_imitate(models, name, flags, needed):
    arguments = (models("qwen3"), name, flags)
    ((loss, gradients, computed),) = processes.run(1, an_iteration, *arguments, False)
    ((whole_loss, whole, everything),) = processes.run(1, an_iteration, *arguments, True)
    assert (computed, everything) == (needed, {0, 1, 2, 3})
    assert loss == whole_loss
    for key, gradient in whole.items():
        assert gradient.any() and torch.equal(gradients[key], gradient), key


def test_a_flag_that_does_nothing_is_said(one_process, caplog):
    models = SimpleNamespace(teacher=[SimpleNamespace(config=SimpleNamespace())])
    assert (
        not building._uses_cuda_graph(SimpleNamespace(enable_cuda_graph=False), models)
        and not caplog.text
    )
    assert not building._uses_cuda_graph(SimpleNamespace(enable_cuda_graph=True), models)
    assert "--enable-cuda-graph is ignored" in caplog.text
