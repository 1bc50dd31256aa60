"""Command-line flags of the student attentions, shared by the tools that take them."""

import argparse

from megatron_attnedit.attention.registry import STUDENT_ATTENTIONS, student_attention_class


def student_flag_names() -> tuple[str, ...]:
    """Names of every student attention's flags, with underscores."""
    classes = map(student_attention_class, STUDENT_ATTENTIONS)
    return tuple(dict.fromkeys(name for cls in classes for name in cls.FLAGS))


def add_student_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--student-attention`` and a group with the flags of each student attention."""
    parser.add_argument("--student-attention", required=required, choices=tuple(STUDENT_ATTENTIONS))
    for name in STUDENT_ATTENTIONS:
        cls = student_attention_class(name)
        group = parser.add_argument_group(cls.TITLE)
        for flag, arguments in cls.FLAGS.items():
            group.add_argument(f"--{flag.replace('_', '-')}", **arguments)
