"""First weights of a student's own QK-norm: shares are found, and undone by the norm's weights."""

import torch

from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.attention.mla.qk_norm import normed_keys, normed_queries
from megatron_attnedit.attention.mla.qk_norm_fit import with_norm
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.fitting.qk_norm_shares import shares_of_keys, shares_of_queries
from tests.support.models import tiny_hf_dir


def test_known_shares_are_found():
    generator = torch.Generator().manual_seed(2)
    content, rotary = (torch.rand(500, *size, generator=generator) for size in ((3, 6), (4,)))
    true = torch.linspace(0.5, 3, 18).view(3, 6), torch.tensor([2.0, 0.7, 2.0, 0.7])
    wanted = (content * true[0]).sum(-1) + (rotary * true[1]).sum(-1, keepdim=True)
    for found, expected in zip(shares_of_keys(content, rotary, wanted), true, strict=True):
        assert (found / found.mean() - expected / expected.mean()).abs().max() < 0.02
    found = shares_of_queries(content, (content * true[0]).sum(-1))
    assert (
        found / found.mean(1, keepdim=True) - true[0] / true[0].mean(1, keepdim=True)
    ).abs().max() < 0.02
    dead = shares_of_queries(content * (torch.arange(6) > 0), wanted)
    assert torch.equal(dead[:, 0], torch.ones(3)) and dead.isfinite().all()


def test_the_norms_weights_undo_the_shares(tmp_path):
    hf = read_hf_config(tiny_hf_dir(tmp_path / "hf"))
    student = MLA.from_flags({"qk_pos_emb_head_dim": 12, "qk_norm": "exact"}, hf)
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    teacher = {
        "linear_qkv.weight": randn(4 * 64, 64),
        "q_layernorm.weight": randn(32) + 1, "k_layernorm.weight": randn(32) + 1,
    }  # fmt: skip
    mine = {name: randn(*shape) for name, shape in student.shapes(64).items() if "norm" not in name}
    mine["kv_layernorm.weight"] = torch.ones(student.kv_lora_rank)
    keys = mine["linear_kv_up_proj.weight"].unflatten(0, (2, 2, -1))
    keys[:, 1] = keys[:, 0]  # of the query heads of a key-value head
    x = torch.randn(300, 64, generator=generator)
    fitted = with_norm(mine, student, x, teacher, hf)

    def query_and_key(weights):
        query = x @ weights["linear_q_proj.weight"].t()
        latent, rotary = (x @ weights["linear_kv_down_proj.weight"].t()).split(
            [student.kv_lora_rank, 12], -1
        )
        latent = torch.nn.functional.rms_norm(latent, latent.shape[1:], eps=1e-6)
        up = (latent @ weights["linear_kv_up_proj.weight"].t()).unflatten(1, (4, -1))
        return query, torch.cat(
            [up[..., : student.qk_head_dim], rotary[:, None].expand(-1, 4, -1)], -1
        )

    def scores(query, key):
        return torch.einsum("snd,tnd->nst", query.unflatten(1, (4, -1)), key)

    query, key = query_and_key(fitted)
    assert (query - query_and_key(mine)[0]).abs().max() > 0.1
    query = normed_queries(query, fitted["qk_norm.weight"], 1e-6, student.query_dim)
    normed = scores(query, normed_keys(key, 2, 1e-6))
    ratios = normed / scores(*query_and_key(mine))  # a factor of each query times one of each key
    cross = ratios[:, :-1, :-1] * ratios[:, 1:, 1:] / (ratios[:, 1:, :-1] * ratios[:, :-1, 1:])
    assert (cross - 1).abs().median() < 1e-4
