"""Flags of MLA, and the sizes and frequencies that they make for a teacher."""

from collections.abc import Mapping
from typing import Any

from megatron_attnedit.attention.mla.cache_cut import cuts_of
from megatron_attnedit.attention.mla.served_sizes import LATENT_AND_ROTARY_OF_ALL, nearest_served
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.errors import UserError

# Size of the cache against the teacher's that the defaults stay below where they can.
DEFAULT_KV_FRACTION = 0.375
AUTO = "auto"
# The teacher's highest frequencies; chosen in each layer; chosen once, the same in all.
ROTARY = ("geometric", "chosen", "chosen-once")
# Into the linear maps; as it is.
QK_NORMS = ("folded", "exact")


def _defaults(teacher: HFConfig) -> dict[str, int]:
    """Sizes that engines have kernels for, as they are or padded: 512 or 256 + 64, 128, 128.

    Heads are as large as the teacher's, half of it rotary. What smaller heads are padded to
    anyway the latent makes use of. Where no served cache is smaller than the teacher's, the sizes
    are in proportion to it.
    """
    head, rotary = teacher.head_dim, teacher.head_dim // 2
    cached = 2 * teacher.num_key_value_heads * head
    aim = DEFAULT_KV_FRACTION * cached
    latent = min(512, max(int(aim - rotary) // 16 * 16, 16))
    padded = nearest_served(1, head, rotary, head)
    smaller = [size for size in LATENT_AND_ROTARY_OF_ALL if size < cached]
    if padded and smaller:
        size = max((size for size in smaller if size <= aim), default=smaller[0])
        latent = size - padded.qk_pos_emb_head_dim
    return {
        "kv_lora_rank": latent,
        "qk_head_dim": head,
        "qk_pos_emb_head_dim": rotary,
        "v_head_dim": head,
    }


def frequency_fields(kind: str, rotary: int, teacher: HFConfig) -> dict[str, Any]:
    """Fields of the rotary frequencies; until they are measured, the teacher's highest.

    With the base they are so exactly: base^(r/d) ^ (-2i/r) = base ^ (-2i/d).
    """
    highest = (tuple(range(rotary // 2)),) * teacher.num_hidden_layers
    return {
        "rotary_base": teacher.rope_theta ** (rotary / teacher.head_dim),
        "rotary_pairs": highest if kind in ROTARY[1:] else (),
    }


def _cuts(flags: Mapping[str, Any], teacher: HFConfig) -> tuple[tuple[int, int], ...]:
    """What ``--kv-lora-rank auto`` chooses among; nothing where the sizes are given."""
    budget = flags.get("kv_budget")
    if (flags.get("kv_lora_rank") == AUTO) != (budget is not None):
        raise UserError("--kv-lora-rank auto and --kv-budget: one needs the other")
    if budget is None:
        return ()
    if not 0 < budget <= 1:
        raise UserError(f"--kv-budget {budget}: expected a share of the teacher's cache, 0 to 1")
    cuts = cuts_of(teacher, budget, flags.get("qk_pos_emb_head_dim"))
    return tuple((cut.latent, cut.rotary) for cut in cuts)


def _qk_norm_groups(flags: Mapping[str, Any], teacher: HFConfig) -> int:
    """Groups of heads that have a norm; 0 for none."""
    kind = flags.get("qk_norm") or QK_NORMS[0]
    if kind not in QK_NORMS:
        raise UserError(f"--qk-norm {kind}: expected one of {', '.join(QK_NORMS)}")
    if kind == QK_NORMS[0]:
        return 0
    if not teacher.qk_norm:
        raise UserError(f"--qk-norm {kind}: {teacher.path} has no norm of queries and keys")
    return teacher.num_key_value_heads


def _count_or_auto(text: str) -> int | str:
    return text if text == AUTO else int(text)


FLAGS: Mapping[str, Mapping[str, Any]] = {
    "kv_lora_rank": {
        "type": _count_or_auto,
        "help": "elements of the cached latent; auto, at edit time: latent and rotary part of "
        "sizes within --kv-budget, those with which fitted layers come closest",
    },
    "kv_budget": {
        "type": float,
        "help": "with --kv-lora-rank auto: share of the teacher's cache, such as 0.35",
    },
    "qk_head_dim": {"type": int, "help": "non-rotary part of a query head"},
    "qk_pos_emb_head_dim": {"type": int, "help": "rotary part, cached once per token"},
    "v_head_dim": {"type": int, "help": "value head; the teacher's head size"},
    "mla_fit": {
        "help": "start from the teacher: attended (default), attention, covariance, pca or svd; "
        "each looks at less of the teacher than the one before"
    },
    "mla_rotary": {
        "help": "what turns with position: geometric (default), the teacher's highest "
        "frequencies, which stock engines take; chosen, of each layer the components that are "
        "worth most, which needs this package's classes; chosen-once, the same frequencies in "
        "all layers, which transformers takes without them"
    },
    "qk_norm": {
        "help": "of a teacher that norms queries and keys: folded (default), into the maps as "
        "their best linear approximation; exact, one more cached number per token and "
        "key-value head, which needs this package's classes and no engine takes"
    },
}


def fields_from(flags: Mapping[str, Any], teacher: HFConfig) -> dict[str, Any]:
    """Fields of the student, completed for this teacher; see ``StudentAttention.from_flags``."""
    cuts = _cuts(flags, teacher)
    if cuts:  # until they are measured, one of them
        first = dict(zip(("kv_lora_rank", "qk_pos_emb_head_dim"), cuts[0], strict=True))
        flags = {**flags, **first}
    given = {
        key: default if flags.get(key) is None else flags[key]
        for key, default in _defaults(teacher).items()
    }
    if given["v_head_dim"] != teacher.head_dim:
        raise UserError(
            f"--v-head-dim {given['v_head_dim']}: the output projection is inherited, so it "
            f"must be the teacher's head_dim {teacher.head_dim}"
        )
    if not 1 <= given["qk_head_dim"] <= 2 * teacher.head_dim:
        raise UserError(
            f"--qk-head-dim {given['qk_head_dim']}: expected 1 to {2 * teacher.head_dim}, "
            "twice the teacher's head_dim"
        )
    rotary = given["qk_pos_emb_head_dim"]
    if rotary % 2 or not 2 <= rotary <= teacher.head_dim:
        raise UserError(
            f"--qk-pos-emb-head-dim {rotary}: expected an even number from 2 to the teacher's "
            f"head_dim {teacher.head_dim}"
        )
    found: dict[str, Any] = {
        **given,
        "rotary": flags.get("mla_rotary") or ROTARY[0],
        "cuts": cuts,
        "num_attention_heads": teacher.num_attention_heads,
        "rope_scaling_factor": (teacher.rope_scaling or {}).get("factor"),
        "qk_norm_groups": _qk_norm_groups(flags, teacher),
    }
    if flags.get("mla_fit"):
        found["fit"] = flags["mla_fit"]
    return found | frequency_fields(found["rotary"], rotary, teacher)
