"""A mask beside tiny data, far from even, and the stages' losses over it in plain PyTorch."""

import json
import shutil
from pathlib import Path

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_attnedit.models.teacher import backbone, output_weight
from megatron_attnedit.training.run import prepare
from tests.support.grids import STAGES
from tests.support.inputs import recipe as small_recipe


def add_mask(folder):
    """``masked.*`` beside ``data.*``: the same tokens, most of which do not count.

    Of every three documents one has none that counts, one its last quarter, one any 70 %: so
    micro-batches and ranks have very different numbers of them.
    """
    data, prefix = folder / "data", folder / "masked"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", f"{prefix}{suffix}")
    tokens, draw = IndexedDataset(str(data)), numpy.random.RandomState(1)
    builder = IndexedDatasetBuilder(f"{prefix}.loss_mask.bin", dtype=numpy.uint8)
    for number in range(len(tokens)):
        length = len(tokens[number])
        mask = numpy.zeros(length, numpy.uint8)
        if number % 3 == 1:
            mask[-(length // 4) :] = 1
        elif number % 3 == 2:
            mask[draw.rand(length) < 0.7] = 1
        builder.add_document(mask, [length])
    builder.finalize(f"{prefix}.loss_mask.idx")
    description = json.loads(Path(f"{data}.json").read_text()) | {"loss_mask_sha256": "random"}
    Path(f"{prefix}.json").write_text(json.dumps(description))
    return str(prefix)


def against_plain_losses(stage, folder, student, save):
    """Loss, gradients and validation of one iteration, and what plain autograd makes of them.

    Returns:
        Two dicts of numbers and tensors under the same names, and the counted tokens.
    """
    cls, fields = STAGES[stage]
    masked = [str(folder / "masked")]
    recipe = small_recipe(
        cls, folder, student, save, train_data_path=masked, valid_data_path=masked, eval_iters=1,
        gradient_accumulation_fusion=False, clip_grad=0.0, **fields,
    )  # fmt: skip
    run = prepare(recipe)
    (module,) = run.stage.modules
    count = recipe.num_microbatches(parallel_state.get_data_parallel_world_size())
    assert count == 4
    found = run.stage.train_step(run.batches(run.train_data, 0), count)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    ours = {name: param.main_grad.clone() for name, param in trained.items()}
    ours["loss"] = torch.tensor(found["loss"])
    valid = run.stage.validate(run.batches(run.valid_data, 0), count)
    kind = _layerwise if stage.startswith("stage 1") else _model_level
    module.train(True)
    batches = run.batches(run.train_data, 0)
    loss, _ = kind(module, _whole(batches, count))
    gradients = torch.autograd.grad(loss, list(trained.values()))
    theirs = dict(zip(trained, gradients, strict=True)) | {"loss": loss.detach()}
    batch = _whole(run.batches(run.valid_data, 0), count)
    module.train(False)
    loss, cross_entropy = kind(module, batch)
    ours["validation"], theirs["validation"] = torch.tensor(valid["loss"]), loss.detach()
    if cross_entropy is not None:
        name = "student lm loss"
        ours[name], theirs[name] = torch.tensor(valid[name]), cross_entropy.detach()
    return ours, theirs, int(batch.loss_mask.sum())


def _whole(batches, count):
    """All micro-batches as one."""
    parts = [next(batches) for _ in range(count)]
    names = ("tokens", "labels", "loss_mask", "position_ids")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return type(parts[0])(**joined)


def _layerwise(module, batch):
    """Sum over layers of the errors' share of the energies, over tokens that count."""
    kept = {}

    def keep(layer_idx):
        def hook(attention, args, kwargs, output):
            # Copies: in evaluation Megatron adds the residual into its output.
            kept[layer_idx] = (args[0].clone(), kwargs, output[0].clone())

        return hook

    handles = [
        layer.self_attention.register_forward_hook(keep(layer.layer_number - 1), with_kwargs=True)
        for layer in module.teacher.decoder.layers
    ]
    with torch.no_grad():
        backbone(module.teacher, batch.tokens, batch.position_ids)
    for handle in handles:
        handle.remove()
    mask, total = batch.loss_mask.t(), 0
    for name, attention in module.attentions.items():
        hidden, kwargs, target = kept[int(name)]
        output, _ = attention(hidden, **kwargs)
        error = ((output - target).square().sum(-1) * mask).sum()
        total = total + error / (target.square().sum(-1) * mask).sum()
    return total, None


def _model_level(module, batch):
    """Means over tokens that count of KL(teacher || student) and the student's cross entropy."""
    words, mask = module.vocab_size, batch.loss_mask.t()

    def log_probabilities(model):
        hidden = backbone(model, batch.tokens, batch.position_ids)
        return (hidden @ output_weight(model)[:words].t()).log_softmax(-1)

    with torch.no_grad():
        teacher = log_probabilities(module.teacher)
    student = log_probabilities(module.student)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    labels = batch.labels.t().unsqueeze(-1)
    cross_entropy = -student.gather(-1, labels).squeeze(-1)
    return (divergence * mask).sum() / mask.sum(), (cross_entropy * mask).sum() / mask.sum()
