#!/usr/bin/env python3
"""Make the embedded teacher's corpus and tokenizer from Debian documentation packages.

Downloads the packages and versions of ``packages.txt`` with apt-get (nothing is installed), takes
the prose out of their HTML, text, reStructuredText and info files, drops code, tables, navigation
and every paragraph seen before, and splits by document. Needs Debian 12, ``pip install lxml`` and
about 10 minutes on 2 cores; once the mirror has newer versions, change the pins.

    python3 prepare_corpus.py --work DIR

writes DIR/{train,validation,heldout}.jsonl, the same text as DIR/{train,validation}.txt.xz for
train.py, DIR/sources.json, the tokenizer into ``model/`` and small samples into ``text/``.
With ``--corpus-only`` it stops after sources.json; that, ``--packages``, ``--held-out`` and
``--with-code`` make corpora for other teachers.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from megatron_attnedit.errors import UserError, run_tool

HERE = Path(__file__).parent
# Never trained on, as whole packages; of the others 1 % of the documents.
HELD_OUT_PACKAGES = {"debian-faq", "gitmagic", "maint-guide", "debian-history"}
MIN_DOCUMENT = 2000  # characters
MAX_DOCUMENT = 120_000
VOCAB_SIZE = 4096
END = "<|endoftext|>"
# Texts for the quick start: from which split, and how many bytes.
SAMPLES = {
    "stage1": ("train", 3_000_000),
    "stage2": ("train", 3_000_000),
    "validation": ("validation", 200_000),
    "heldout": ("heldout", 400_000),
}
MIN_SAMPLE, MAX_SAMPLE = 6000, 24_000  # characters of a piece
# What --with-code adds: example files, and how a line of code is told from a fragment of prose.
CODE_SUFFIXES = (".c", ".cc", ".cpp", ".h", ".hpp", ".hs", ".java", ".js", ".lisp", ".ml", ".nim")
CODE_SUFFIXES += (".el", ".pas", ".pl", ".pm", ".py", ".rb", ".scm", ".sh", ".sql", ".tcl", ".erl")
MAX_CODE = 20_000  # characters of an example that stays whole
CODE_MARK = re.compile(r"[{}();=]|->|::|^\s*[$#>]", re.MULTILINE)
LICENCE = re.compile(r"^License:[ \t]*(\S[^\n]*)", re.MULTILINE)
COMMON_LICENCE = re.compile(r"common-licenses/([\w.+-]*\w)")
# Packages whose notice is free text, or lies in a package that they depend on.
NAMED_LICENCES = {
    "cmake-doc": "BSD-3-clause",
    "debian-faq": "permission notice of its own, copyleft",
    "festival-doc": "permissive notice of its own, GPL for examples",
    "imagemagick-6-doc": "ImageMagick",
    "postfix-doc": "IPL-1.0 or EPL-2.0",
    "tcl8.6-doc": "TCL",
    "user-mode-linux-doc": "GFDL-1.1",
    "zsh-doc": "Zsh",
}


@dataclass(frozen=True)
class Corpus:
    """Which text.

    Attributes:
        held_out: Packages that are never trained on.
        max_bytes: Most text of one package.
        with_code: Keep code, in documents and in example files.
        documents_held_out: Of the other packages, held-out documents in a thousand.
    """

    held_out: frozenset[str]
    max_bytes: int
    with_code: bool = False
    documents_held_out: int = 10


def download(work: Path, packages: list[Path]) -> list[Path]:
    """Fetch the packages that are not there yet."""
    debs = work / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    pins = [pin for file in packages for pin in file.read_text().split()]

    def pin_of(path: Path) -> str:
        name, version, _ = path.name.split("_", 2)
        return f"{name}={version.replace('%3a', ':')}"

    have = {pin_of(path) for path in debs.glob("*.deb")}
    missing = [pin for pin in pins if pin not in have]
    if missing:
        try:
            subprocess.run(["apt-get", "download", "-q", *missing], cwd=debs, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"{packages[-1]}: apt-get download failed, see above "
                "(`apt-get update` first: its list of packages may be missing or old)"
            ) from error
    return sorted(path for path in debs.glob("*.deb") if pin_of(path) in pins)


def html_paragraphs(data: bytes, with_code: bool) -> list[str]:
    """Text of the elements that hold prose, headings included, and code where wanted."""
    from lxml import html

    try:
        tree = html.fromstring(data.decode("utf-8", "replace"))
    except (ValueError, html.etree.ParserError, AssertionError):
        return []
    unwanted = "//script|//style|//nav|//table|//footer|//header|//form"
    wanted = "//h1|//h2|//h3|//h4|//p|//li[not(.//p)]|//dd[not(.//p)]|//dt"
    if with_code:
        wanted = wanted.replace("not(.//p)", "not(.//p|.//pre)") + "|//pre"
    else:
        unwanted += "|//pre"
    for node in tree.xpath(unwanted):
        node.drop_tree()
    return [node.text_content() for node in tree.xpath(wanted)]


def text_paragraphs(data: bytes) -> list[str]:
    """Blank-line separated blocks."""
    return re.split(r"\n\s*\n", data.decode("utf-8", "replace"))


def is_prose(text: str) -> bool:
    """Mostly words, ended like a sentence or short like a heading; English letters."""
    if len(text) < 20 or len(text) > 8000:
        return False
    letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
    if letters / len(text) < 0.84 or any(mark in text for mark in ("{", "};", "==", "::", "->")):
        return False
    words = text.split()
    if sum(map(len, words)) / len(words) > 8 or max(map(len, words)) > 45:
        return False
    return len(words) >= 8 and text[-1] in ".:!?\"')" or text[0].isupper() and len(words) >= 3


def is_code(text: str) -> bool:
    """Several lines of ordinary length, or one with a mark of code; mostly ASCII, no table."""
    lines = text.splitlines()
    if not 20 <= len(text) <= MAX_CODE or max(map(len, lines)) > 160:
        return False
    if sum(c.isascii() and c.isprintable() or c == "\n" for c in text) / len(text) < 0.98:
        return False
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return letters / len(text) > 0.6 and (len(lines) > 2 or bool(CODE_MARK.search(text)))


def document(path: Path, with_code: bool) -> list[str]:
    """Prose paragraphs of a file, white space normalised, and code as it stands where wanted."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    name = path.name.removesuffix(".gz")
    if name.endswith((".html", ".htm", ".xhtml")):
        parts = html_paragraphs(data, with_code)
    elif name.endswith(CODE_SUFFIXES) and len(data) <= MAX_CODE:
        parts = [data.decode("utf-8", "replace")]
    else:
        parts = text_paragraphs(data)
    paragraphs = []
    for part in parts:
        text = " ".join(part.split())
        if is_prose(text):
            paragraphs.append(text.replace("\u00b6", "").strip())
        elif with_code:
            code = part.replace("\u00a0", " ").expandtabs(4).rstrip().strip("\n")
            if is_code(code):
                paragraphs.append(code)
    return paragraphs


def files(folder: Path, with_code: bool) -> Iterator[Path]:
    """Documentation of a package; translations left out."""
    suffixes = (".html", ".htm", ".xhtml", ".txt", ".rst", ".info", ".text", ".texi", ".org")
    if with_code:
        suffixes += CODE_SUFFIXES
    languages = "de fr es it ja ko pt pt-br ru zh zh-cn zh_CN zh_TW pl cs nl sv da fi hu id vi "
    languages += "uk tr el ca gl nb ro sk sr hr lt he ar it_IT"
    foreign = re.compile(rf"[/._-]({languages.replace(' ', '|')})([/._-]|$)")
    for path in sorted(folder.rglob("*")):
        name = path.name.removesuffix(".gz")
        wanted = name.endswith(suffixes) or re.search(r"\.info-\d+$", name) or "." not in name
        skipped = foreign.search(str(path.relative_to(folder))) or "copyright" in name
        skipped = skipped or "changelog" in name.lower() or path.is_symlink()
        if wanted and not skipped and path.is_file():
            yield path


def read_package(deb: Path, with_code: bool) -> tuple[dict, list[tuple[str, list[str]]]]:
    """A package's entry in the sources table, and its documents."""
    folder = deb.parent.parent / "extracted" / deb.stem
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
    name, version, _ = deb.name.split("_", 2)
    notices = [p.read_text(errors="replace") for p in folder.glob("usr/share/doc/*/copyright")]
    licences = sorted({found.strip() for text in notices for found in LICENCE.findall(text)})
    licences = licences or sorted({f for text in notices for f in COMMON_LICENCE.findall(text)})
    documents = []
    for path in files(folder, with_code):
        try:
            documents.append((str(path.relative_to(folder)), document(path, with_code)))
        except (OSError, EOFError, gzip.BadGzipFile):
            continue
    source = {
        "package": name,
        "version": version.replace("%3a", ":"),
        "licence": NAMED_LICENCES.get(name, ", ".join(licences[:4])),
    }
    return source, documents


def split_of(package: str, path: str, corpus: Corpus) -> str:
    """train, validation or heldout, by document."""
    if package in corpus.held_out:
        return "heldout"
    draw = int(hashlib.sha256(f"{package}/{path}".encode()).hexdigest(), 16) % 1000
    if draw < corpus.documents_held_out:
        return "heldout"
    return "validation" if draw < corpus.documents_held_out + 5 else "train"


def write_corpus(work: Path, debs: list[Path], corpus: Corpus) -> None:
    """Deduplicate paragraphs over everything, and write documents by split."""
    seen: set[bytes] = set()
    out = {name: (work / f"{name}.jsonl").open("w") for name in ("train", "validation", "heldout")}
    sources = []
    with Pool(2) as pool:
        # Held-out packages first, so that no training document repeats their paragraphs.
        debs = sorted(debs, key=lambda d: (d.name.split("_")[0] not in corpus.held_out, d.name))
        for source, documents in pool.imap(partial(read_package, with_code=corpus.with_code), debs):
            kept = 0
            for path, paragraphs in documents:
                fresh = []
                for text in paragraphs:
                    key = hashlib.blake2b(text.encode(), digest_size=8).digest()
                    if key not in seen and kept < corpus.max_bytes:
                        seen.add(key)
                        fresh.append(text)
                text = "\n\n".join(fresh)[:MAX_DOCUMENT]
                if len(text) < MIN_DOCUMENT:
                    continue
                kept += len(text.encode())
                line = {"text": text, "source": source["package"], "path": path}
                out[split_of(source["package"], path, corpus)].write(json.dumps(line) + "\n")
            sources.append({**source, "bytes": kept})
            licence = source["licence"][:50]
            print(f"{source['package']:32} {kept / 1e6:7.2f} MB  {licence}", flush=True)
    for file in out.values():
        file.close()
    (work / "sources.json").write_text(json.dumps(sources, indent=1))
    print(f"{sum(s['bytes'] for s in sources) / 1e6:.1f} MB")


def train_tokenizer(work: Path) -> None:
    """Byte-level BPE in the files that transformers loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[str]:
        with (work / "train.jsonl").open() as file:
            for i, line in enumerate(file):
                if i % 4 == 0:
                    yield json.loads(line)["text"]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)
    fast.model_max_length = 2048
    fast.save_pretrained(HERE / "model")


def write_training_text(work: Path) -> None:
    """What train.py reads: documents separated by NUL, compressed."""
    for split in ("train", "validation"):
        texts = (json.loads(line)["text"] for line in (work / f"{split}.jsonl").open())
        with lzma.open(work / f"{split}.txt.xz", "wt", preset=6) as file:
            file.write("\0".join(texts))


def write_samples(work: Path) -> None:
    """The small texts beside the model, for the quick start: pieces of randomly drawn documents."""
    (HERE / "text").mkdir(exist_ok=True)
    draw = random.Random(0)
    documents = {}
    for split in ("train", "validation", "heldout"):
        lines = (work / f"{split}.jsonl").read_text().splitlines()
        draw.shuffle(lines)
        documents[split] = iter(lines)
    for name, (split, size) in SAMPLES.items():
        with gzip.GzipFile(HERE / "text" / f"{name}.jsonl.gz", "w", mtime=0) as file:
            written = 0
            while written < size:
                document = json.loads(next(documents[split]))
                if len(document["text"]) >= MIN_SAMPLE:
                    text = document["text"][:MAX_SAMPLE]
                    line = json.dumps({"text": text, "source": document["source"]})
                    written += file.write(f"{line}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and output")
    parser.add_argument("--max-mb", type=float, default=9.0, help="most text of one package, MB")
    parser.add_argument("--packages", type=Path, nargs="+", default=[HERE / "packages.txt"])
    parser.add_argument("--held-out", nargs="+", help="hold out these packages and nothing else")
    parser.add_argument("--with-code", action="store_true", help="keep code beside the prose")
    parser.add_argument("--corpus-only", action="store_true", help="no tokenizer, no samples")
    args = parser.parse_args()
    corpus = Corpus(
        held_out=frozenset(args.held_out or HELD_OUT_PACKAGES),
        max_bytes=int(args.max_mb * 1e6),
        with_code=args.with_code,
        documents_held_out=0 if args.held_out else 10,
    )
    debs = download(args.work, args.packages)
    write_corpus(args.work, debs, corpus)
    if args.corpus_only:
        return
    train_tokenizer(args.work)
    write_training_text(args.work)
    write_samples(args.work)


if __name__ == "__main__":
    run_tool(main)
