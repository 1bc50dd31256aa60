"""Command-line flags of the student attentions, shared by the tools that take them."""

import argparse

NAMES = (
    *("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "mla_fit"),
    *("sliding_window", "sink_tokens", "full_layers", "output_gate"),
)


def add_student_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--student-attention`` and every dimension."""
    parser.add_argument("--student-attention", required=required, choices=("mla", "gate_swa"))
    mla = parser.add_argument_group("MLA (defaults follow from the teacher's head size)")
    mla.add_argument("--kv-lora-rank", type=int, help="numbers of the cached latent")
    mla.add_argument("--qk-head-dim", type=int, help="non-rotary part of a query head")
    mla.add_argument("--qk-pos-emb-head-dim", type=int, help="rotary part, cached once per token")
    mla.add_argument("--v-head-dim", type=int, help="value head; the teacher's head size")
    mla.add_argument(
        "--mla-fit",
        help="start from the teacher: attention (default), covariance, pca or svd; each looks at "
        "less of the teacher than the one before",
    )
    swa = parser.add_argument_group("GateSWA")
    swa.add_argument("--sliding-window", type=int, help="tokens seen, itself counted (default 128)")
    swa.add_argument(
        "--sink-tokens",
        type=int,
        help="first tokens of the sequence that sliding layers see beside the window (default 0)",
    )
    swa.add_argument(
        "--full-layers",
        help="layers that stay full, such as 4,9, or none; auto, at edit time: as many as by "
        "default, those without whose far sight the teacher's loss rises most "
        "(default: every fifth)",
    )
    swa.add_argument("--output-gate", help="elementwise (default) or headwise")
