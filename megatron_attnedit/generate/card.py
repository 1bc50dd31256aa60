"""The card of a folder of generated text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_attnedit.data.tokenizer import sha256_of

TEMPLATE = """---
task_categories:
- text-generation
tags:
- synthetic
configs:
- config_name: default
  data_files: data.jsonl
---

# {title}

{rows:,} completions of {prompts:,} prompts. Every line of `data.jsonl` is a conversation
(`messages`, and `tools` where there are any) whose last turn the model wrote, with the prompt's
`id`, the number of the `sample` and its `seed`.
Model and prompts have licences of their own; they bind this text, too.

## Model

{model}

## Prompts

{sources}

{duplicates:,} prompts that were there before, and {bad_rows:,} rows{kinds}, were left out.

## Sampling

{sampling}

## Left out

{left_out}

## Use

```
python tools/preprocess_data.py --messages --input data.jsonl --tokenizer MODEL --output PREFIX
```
"""


def card(
    *,
    model: dict[str, Any],
    sources: Sequence[str],
    sampling: dict[str, Any],
    counts: dict[str, Any],
) -> str:
    """A README in the form of the Hugging Face hub.

    Args:
        model: Of ``Model.describe``.
        sources: Files or ``hf:`` names of the prompts.
        sampling: Of ``Sampling.as_dict``.
        counts: ``rows``, ``prompts``, ``duplicates``, and ``bad_rows`` and ``left_out`` by kind.
    """
    bad_rows, left_out = counts["bad_rows"], counts["left_out"]
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(bad_rows.items()))
    return TEMPLATE.format(
        title=f"Text by {model['model']}",
        rows=counts["rows"],
        prompts=counts["prompts"],
        model=_lines(model),
        sources="\n".join(map(_source, sources)),
        duplicates=counts["duplicates"],
        bad_rows=sum(bad_rows.values()),
        kinds=kinds and f" ({kinds})",
        sampling=_lines(sampling),
        left_out=_lines(dict(sorted(left_out.items()))) if left_out else "No completion.",
    )


def _lines(values: dict[str, Any]) -> str:
    return "\n".join(
        f"- {name.replace('_', ' ')}: {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in values.items()
    )


def _source(source: str) -> str:
    file = Path(source)
    if not file.is_file():
        return f"- `{source}`"
    return f"- `{file.name}`, {file.stat().st_size:,} bytes, SHA-256 {sha256_of([file])}"
