"""Every measure against a plain computation, and the identical model against itself."""

import gzip
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from megatron_attnedit.evaluate import generation, kv_cache, recall
from megatron_attnedit.evaluate.compare import compare, compared
from megatron_attnedit.evaluate.generation import agreement, repetition_rate
from megatron_attnedit.evaluate.next_token import Perplexity
from megatron_attnedit.evaluate.text import token_windows
from megatron_attnedit.export.loading import load_model, load_tokenizer
from tests.support.hf_students import DIMS, LATENT, ROTARY, WINDOW, WORDS

LENGTH = 40


@pytest.fixture(scope="module")
def load():
    return lambda directory: load_model(directory, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def windows(teacher_dir, text_file):
    return token_windows(text_file, load_tokenizer(teacher_dir), LENGTH, 5)


@pytest.fixture(params=["gate_swa_dir", "mla_dir"])
def student(request, load):
    return load(request.getfixturevalue(request.param))


def measure(teacher, student, windows, batch_size=2):
    measured = compared(3)
    perplexity = compare(teacher, [(student, measured)], windows, batch_size)
    return perplexity, measured


def test_perplexity_kl_and_agreement(load, teacher_dir, student, windows, monkeypatch):
    monkeypatch.setattr("megatron_attnedit.evaluate.compare.CHUNK_TOKENS", 30)
    teacher = load(teacher_dir)
    perplexity, measured = measure(teacher, student, windows)
    with torch.no_grad():
        p, q = (m(windows[:, :-1]).logits.double().flatten(0, 1) for m in (teacher, student))
    labels = windows[:, 1:].flatten()
    assert perplexity.value() == pytest.approx(F.cross_entropy(p, labels).exp().item(), rel=1e-5)
    expected = F.cross_entropy(q, labels).exp().item()
    assert measured.perplexity.value() == pytest.approx(expected, rel=1e-5)
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert measured.distance.kl() == pytest.approx(kl.item(), rel=1e-5)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert measured.distance.top1_agreement() == pytest.approx(same)
    assert kl > 0.1 and 0 < same < 1
    nats = [F.cross_entropy(logits, labels, reduction="none") for logits in (p, q)]
    kl_of_tokens = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    root, found = len(labels) ** 0.5, measured.distance.stderrs()
    ratio = (nats[1] - nats[0]).mean().exp()
    assert measured.perplexity.stderr() == pytest.approx(expected * nats[1].std().item() / root)
    assert found["kl"] == pytest.approx(kl_of_tokens.std().item() / root, rel=1e-4)
    assert found["perplexity_ratio"] == pytest.approx(
        (ratio * (nats[1] - nats[0]).std() / root).item(), rel=1e-4
    )
    top1 = (same * (1 - same) / (len(labels) - 1)) ** 0.5
    assert found["top1_agreement"] == pytest.approx(top1)


def test_layer_errors(load, teacher_dir, student, windows):
    """Each student attention called by hand on the teacher's hidden states."""
    teacher = load(teacher_dir)
    _, measured = measure(teacher, student, windows, batch_size=3)
    ids = windows[:, :-1]
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    banded = mask & ~mask.tril(-WINDOW)
    kinds = getattr(student.config, "layer_types", None) or ["full_attention"] * 3
    positions, like = torch.arange(LENGTH)[None], torch.zeros(1)
    angles = [model.model.rotary_emb(like, positions) for model in (teacher, student)]
    with torch.no_grad():
        hidden = teacher.model(ids, output_hidden_states=True).hidden_states
        for i, kind in enumerate(kinds):
            given = teacher.model.layers[i].input_layernorm(hidden[i])
            outputs = [
                model.model.layers[i].self_attn(
                    hidden_states=given,
                    position_embeddings=angle,
                    attention_mask=allowed.expand(len(ids), 1, LENGTH, LENGTH),
                )[0]
                for model, angle, allowed in (
                    (teacher, angles[0], mask),
                    (student, angles[1], banded if kind == "sliding_attention" else mask),
                )
            ]
            error = (outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum()
            assert measured.layer_errors.values()[i] == pytest.approx(error.item(), rel=1e-4)


def test_padded_values_change_nothing(load, mla_dir, windows):
    ours = load(mla_dir)
    stock = AutoModelForCausalLM.from_pretrained(mla_dir, attn_implementation="eager")
    assert ours.config._attn_implementation == "sdpa_padded_value"
    assert stock.config.v_head_dim < stock.config.qk_head_dim
    with torch.no_grad():
        one, other = ours(windows).logits, stock(windows).logits
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_model_is_at_no_distance_from_itself(load, teacher_dir, windows):
    perplexity, measured = measure(load(teacher_dir), load(teacher_dir), windows)
    assert measured.distance.kl() == 0
    assert measured.distance.top1_agreement() == 1
    assert measured.layer_errors.values() == [0, 0, 0]
    assert measured.perplexity.value() == perplexity.value()


def test_the_hooks_are_gone_afterwards(load, teacher_dir, student, windows):
    teacher = load(teacher_dir)
    before = student(windows[:, :-1]).logits
    measure(teacher, student, windows)
    assert torch.equal(student(windows[:, :-1]).logits, before)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_size_changes_nothing(load, teacher_dir, student, windows, batch_size):
    teacher = load(teacher_dir)
    _, one = measure(teacher, student, windows, batch_size)
    _, other = measure(teacher, student, windows, 2)
    assert one.distance.kl() == pytest.approx(other.distance.kl(), rel=1e-5)
    assert one.layer_errors.values() == pytest.approx(other.layer_errors.values(), rel=1e-5)


def test_perplexity_beyond_a_float_is_infinite():
    perplexity = Perplexity()
    perplexity.add(torch.tensor([[0.0, -2000.0]]), torch.tensor([1]))
    assert perplexity.value() == math.inf


def test_kv_bytes_of_each_attention(load, teacher_dir, gate_swa_dir, mla_dir):
    per_token = 2 * DIMS["num_key_value_heads"] * 16 * 4
    teacher = load(teacher_dir)
    assert kv_cache.cache_bytes(teacher, 100) == 3 * 100 * per_token
    # The window and nothing more: the W - 1 tokens that the next one needs are a slice of W.
    sliding = load(gate_swa_dir)
    assert kv_cache.cache_bytes(sliding, 100) == (100 + 2 * WINDOW) * per_token
    # transformers 5.23 caches the latent and the rotary key, nothing else.
    assert kv_cache.cache_bytes(load(mla_dir), 100) == 3 * 100 * (LATENT + ROTARY) * 4


def test_kv_figures(load, teacher_dir):
    figures = kv_cache.measure(load(teacher_dir), 1024)
    assert figures["kv_context"] == 128  # the model's longest
    assert figures["kv_bytes_per_token"] == 3 * 2 * 2 * 16 * 4
    assert kv_cache.contexts(1000) == [128, 256, 512, 1000]


def test_continuations_are_greedy(load, teacher_dir, student, windows):
    """The cache of each attention against the whole sequence computed anew."""
    tokenizer = load_tokenizer(teacher_dir)
    prompts = generation.prompts_from(windows, 3)
    generated = generation.greedy(student, prompts)
    ids = prompts
    with torch.no_grad():
        for _ in range(generation.NEW_TOKENS):
            ids = torch.cat([ids, student(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids[:, prompts.shape[1] :])
    generated[0, 5] = generated[1, 0] = tokenizer.eos_token_id
    generated[2][generated[2] == tokenizer.eos_token_id] = 5
    cut = [generated[0, :5], generated[1, :0], generated[2]]
    assert generation.texts(tokenizer, generated) == [
        tokenizer.decode(row, skip_special_tokens=True) for row in cut
    ]


def test_agreement_of_continuations():
    teacher = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1]])
    student = torch.tensor([[1, 2, 3, 4], [5, 0, 7, 8], [0, 1, 1, 1]])
    assert agreement(teacher, student) == {
        "equal_tokens": pytest.approx(10 / 12),
        "first_divergence": pytest.approx((4 + 1 + 0) / 3),
        "identical": pytest.approx(1 / 3),
    }


def test_errors_are_over_prompts():
    teacher = torch.tensor([[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [1, 1, 1, 1, 1]])
    found = generation.described(teacher, torch.stack([teacher[0], teacher[1] + 1, teacher[2]]))
    assert found["prompts"] == 3 and found["identical"] == pytest.approx(2 / 3)
    assert found["identical_stderr"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert found["repetition_rate"] == pytest.approx(1 / 6)
    assert found["repetition_rate_stderr"] == pytest.approx(1 / 6)


def test_repetition_rate():
    fresh, loop = torch.arange(10), torch.tensor([1, 2] * 5)
    assert repetition_rate(fresh[None]) == 0
    # Seven 4-grams of which two differ.
    assert repetition_rate(loop[None]) == pytest.approx(5 / 7)
    assert repetition_rate(torch.stack([fresh, loop])) == pytest.approx(5 / 14)


class Copier(torch.nn.Module):
    """Predicts what followed the last occurrence of the present token and the one before it.

    ``reach``: how many tokens it looks back.
    """

    def __init__(self, reach):
        super().__init__()
        self.reach, self.device, self.model = reach, torch.device("cpu"), self

    def forward(self, ids, use_cache):
        assert not use_cache
        hidden = torch.zeros(*ids.shape, len(WORDS))
        for row, out in zip(ids.tolist(), hidden, strict=True):
            for i in range(1, len(row)):
                for j in range(max(1, i - self.reach), i):
                    if row[j - 1 : j + 1] == row[i - 1 : i + 1]:
                        out[i] = 0
                        out[i, row[j + 1]] = 50
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self):
        return lambda hidden: hidden


def test_recall_needs_what_is_far_back(teacher_dir, text_file):
    windows = token_windows(text_file, load_tokenizer(teacher_dir), 96, 5)
    sequences = recall.probes(windows, 7, end=None)
    pair = recall.KEY_TOKENS + recall.VALUE_TOKENS
    assert sequences.shape == (7, 96)
    starts = []
    for i, row in enumerate(sequences):
        found = [j for j in range(96 - pair) if torch.equal(row[j : j + pair], row[-pair:])]
        assert len(found) == 1
        changed = row != windows[i % 5, :96]
        changed[found[0] : found[0] + pair] = changed[-pair:] = False
        assert not changed.any()
        starts.append(found[0])
    assert starts[0] == 0 and starts == sorted(starts)
    assert 96 - pair - (starts[-1] + pair) >= 0.25 * (96 - pair)
    far = recall.recall(Copier(reach=96), sequences, batch_size=2)
    assert far["accuracy"] > 0.9 and far["nll"] < 1
    near = recall.recall(Copier(reach=16), sequences, batch_size=3)
    assert near["accuracy"] < 0.2 and near["nll"] > math.log(len(WORDS)) - 0.5


def test_no_document_ends_inside_a_probe(teacher_dir, text_file):
    windows = token_windows(text_file, load_tokenizer(teacher_dir), 96, 5)
    end = int(windows.flatten().mode().values)  # any token that stands there often
    windows[0, 40:42] = end
    sequences = recall.probes(windows, 7, end)
    assert (windows == end).any(dim=1).all() and not (sequences == end).any()
    pair = recall.KEY_TOKENS + recall.VALUE_TOKENS
    for i, row in enumerate(sequences):
        changed = row[:-pair] != windows[i % 5, : 96 - pair]
        assert changed.sum() <= pair + (windows[i % 5] == end).sum()


def test_recall_of_a_real_model(load, teacher_dir, windows):
    teacher = load(teacher_dir)
    sequences = recall.probes(torch.cat([windows, windows], dim=1), 3, end=None)
    found = recall.recall(teacher, sequences, batch_size=2)
    with torch.no_grad():
        logits = teacher(sequences[:, :-1]).logits[:, -recall.VALUE_TOKENS :]
    values = sequences[:, -recall.VALUE_TOKENS :]
    expected = F.cross_entropy(logits.flatten(0, 1), values.flatten())
    assert found["nll"] == pytest.approx(expected.item(), rel=1e-5)
    right = (logits.argmax(-1) == values).double().mean(-1)
    assert found["accuracy"] == pytest.approx(right.mean().item())
    assert found["accuracy_stderr"] == pytest.approx((right.std() / 3**0.5).item())
    assert found["probes"] == 3


def test_windows_hold_the_documents_in_order(teacher_dir, tmp_path):
    file = tmp_path / "a.jsonl.gz"
    with gzip.open(file, "wt") as stream:
        stream.write('{"text": "w0 w1 w2"}\n{"text": "w3 w4 w5 w6"}\n')
    windows = token_windows(file, load_tokenizer(teacher_dir), 3, None)
    assert windows.tolist() == [[2, 3, 4, 0], [0, 5, 6, 7]]
    assert token_windows(file, load_tokenizer(teacher_dir), 3, 1).tolist() == [[2, 3, 4, 0]]
