"""Stage 1 on the student's own hidden states, against a plain loop over the layers."""

import pytest
import torch

from megatron_attnedit.device import bootstrap
from megatron_attnedit.distill.layerwise import LayerwiseDistillation
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.teacher import backbone
from megatron_attnedit.training.setup import load_teacher, start_processes
from megatron_attnedit.training.student import Student, find_student
from tests.support import processes
from tests.support.inputs import STUDENTS, make_inputs
from tests.support.models import tokens as random_tokens

LAYERS, BATCH, LENGTH = 4, 3, 32
BAR = 1e-5
DRAWS = {
    "mixed": lambda: torch.rand(LAYERS, BATCH, generator=torch.Generator().manual_seed(2)) < 0.6,
    "never": lambda: torch.zeros(LAYERS, BATCH, dtype=torch.bool),
    "always": lambda: torch.ones(LAYERS, BATCH, dtype=torch.bool),
}


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def inputs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return make_inputs(folder, request.param, num_hidden_layers=LAYERS)


def loaded(folder, name):
    """Teacher, student with its attentions to train, tokens, positions and mask."""
    accelerator = start_processes(ParallelConfig())
    teacher = load_teacher(str(folder / "hf"), ParallelConfig(), torch.float32, accelerator)
    student = Student(teacher, *find_student(str(folder / name)), attention_backend="reference")
    student.trained_modules()
    tokens = random_tokens(BATCH, LENGTH).to(bootstrap().device)
    mask = torch.ones(BATCH, LENGTH)
    mask[0, 5:9] = mask[2, :3] = 0
    return teacher.model, student, tokens, torch.arange(LENGTH).expand_as(tokens), mask


def gradients(student):
    """By name; taken out, so that the next backward restarts."""
    found = {}
    for layer_idx, module in student.attentions.items():
        for name, param in module.named_parameters():
            found[f"{layer_idx}.{name}"], param.grad = param.grad, None
    return found


def ours(teacher, student, batch, normalisation, *draws):
    chunk = student.chunks[0] if draws else None
    module = LayerwiseDistillation(
        teacher, student.attentions, normalisation=normalisation, student=chunk
    ).train()
    return module(*batch, *draws), module.sums, gradients(student)


def rest(layer, hidden):
    """A layer after its attention."""
    return hidden + layer.mlp(layer.pre_mlp_layernorm(hidden))[0]


def reference(teacher, student, batch, normalisation, own):
    """One autograd graph for all layers, cut where the student's stream enters a layer."""
    tokens, positions, mask = batch
    rotary = teacher.rotary_pos_emb(tokens.shape[1])
    theirs = mine = teacher.embedding(tokens, positions)
    mask, sums, total = mask.t(), torch.zeros(LAYERS, 2), 0
    for i, layer in enumerate(teacher.decoder.layers):
        normed = layer.input_layernorm(theirs)
        target = layer.self_attention(normed, None, rotary_pos_emb=rotary)[0]
        if i in student.attentions:
            entering = torch.where(own[i][None, :, None], mine, theirs).detach()
            normed = layer.input_layernorm(entering)
            output = student.attentions[i](normed, None, rotary_pos_emb=rotary)[0]
            error = (entering + output - theirs - target).square().sum(-1)
            energy = target.square().sum(-1)
            if normalisation == "token":
                error, energy = error / energy, torch.ones_like(energy)
            sums[i] = torch.stack([(error * mask).sum(), (energy * mask).sum()]).detach()
            total = total + (error * mask).sum()
            mine = rest(layer, entering + output)
        else:
            mine = layer(hidden_states=mine, attention_mask=None, rotary_pos_emb=rotary)[0]
        theirs = rest(layer, theirs + target)
    total.backward()
    hidden = torch.cat([mine, teacher.decoder.final_layernorm(theirs)], dim=1)
    return hidden.detach(), sums, gradients(student)


def with_reference(folder, name, normalisation, own):
    teacher, student, *batch = loaded(folder, name)
    expected = reference(teacher, student, batch, normalisation, own)
    return ours(teacher, student, batch, normalisation, own), expected


def close(a, b):
    return (a - b).norm() <= BAR * b.norm()


@pytest.mark.parametrize(
    ("draws", "normalisation"), [("mixed", "layer"), ("mixed", "token"), ("always", "layer")]
)
@pytest.mark.parametrize("name", STUDENTS)
def test_values_and_gradients(inputs, name, draws, normalisation):
    own = DRAWS[draws]()
    ((found, expected),) = processes.run(1, with_reference, inputs, name, normalisation, own)
    assert close(found[0], expected[0]) and close(found[1], expected[1])
    assert found[2].keys() == expected[2].keys() and found[2]
    for key, gradient in expected[2].items():
        assert gradient.norm() > 0 and close(found[2][key], gradient), key


def trained_on(folder, name, *draws):
    teacher, student, *batch = loaded(folder, name)
    return ours(teacher, student, batch, "layer", *draws)


@pytest.mark.parametrize("name", STUDENTS)
def test_never_is_teacher_forcing(inputs, name):
    (forced,) = processes.run(1, trained_on, inputs, name)
    (never,) = processes.run(1, trained_on, inputs, name, DRAWS["never"]())
    # Not the hidden states: by itself the teacher stops behind the last edited attention.
    assert torch.equal(never[1], forced[1])
    for key, gradient in forced[2].items():
        assert torch.equal(never[2][key], gradient), key


def stream_and_student(folder, name):
    teacher, student, *batch = loaded(folder, name)
    with torch.no_grad():
        alone = backbone(student.chunks[0], *batch[:2])
    hidden, _, _ = ours(teacher, student, batch, "layer", DRAWS["always"]())
    return teacher.decoder.final_layernorm(hidden[:, :BATCH]).detach(), alone


@pytest.mark.parametrize("name", STUDENTS)
def test_always_is_the_student(inputs, name):
    """With every draw won, the stream is what the student computes at inference."""
    ((stream, alone),) = processes.run(1, stream_and_student, inputs, name)
    assert close(stream, alone)
