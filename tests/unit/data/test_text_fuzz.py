"""Damaged and unusual text files: the right documents, or one line that names file and line.

Each goes through preprocessing and through the reader of evaluation. Seeds are fixed.
"""

import gzip
import io
import json
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from transformers import AutoTokenizer

from megatron_attnedit.data.documents import DatasetOptions, read_documents
from megatron_attnedit.data.tokenizer import load_tokenizer
from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.text import token_windows
from tests.support.tokenizers import corpus
from tests.support.tools import call_tool
from tests.unit.data.test_preprocess import documents, run

UNUSUAL = ["two\nlines\r\n", "na\xefve caf\xe9 \u2211 \u6f22\u5b57 \U0001f600", "\u2028 and \x85"]
TEXTS = [*corpus(30), *UNUSUAL]
LINES = "".join(
    json.dumps({"text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS)
)
PROSE = "\n".join(TEXTS)
BOM = b"\xef\xbb\xbf"


SKIPPABLE = (0x184D2A5E).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"xyz"


def zst(content: bytes, checksum: bool = True) -> bytes:
    """A frame of several blocks after a skippable one."""
    return SKIPPABLE + b"".join(blocks(content, checksum))


def blocks(content: bytes, checksum: bool) -> list[bytes]:
    """A frame in parts that end with a block."""
    frame = zstandard.ZstdCompressor(write_checksum=checksum).compressobj()
    parts = [
        frame.compress(content[i : i + 300]) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for i in range(0, len(content), 300)
    ]
    return [*parts, frame.flush()]


def parquet(texts: list[str | None]) -> bytes:
    out = io.BytesIO()
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, out, row_group_size=7, write_page_checksum=True)
    return out.getvalue()


def arrow(texts: list[str | None]) -> bytes:
    out = io.BytesIO()
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
    with pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return out.getvalue()


PACK = {"": bytes, ".gz": lambda content: gzip.compress(content, mtime=0), ".zst": zst}
WHOLE = {
    **{f"a.jsonl{end}": pack(LINES.encode()) for end, pack in PACK.items()},
    **{f"a.txt{end}": pack(PROSE.encode()) for end, pack in PACK.items()},
    "a.parquet": parquet(TEXTS),
    "a.arrow": arrow(TEXTS),
}
PLAIN = ("a.jsonl", "a.txt")


def truth(name: str, content: bytes) -> list[str]:
    """The documents of a file, read in another way; a damaged plain file is what it holds."""
    if name.lower() == "a.jsonl":
        lines = content.decode("utf-8-sig").split("\n")
        return [json.loads(line)["text"] for line in lines if line.strip()]
    if name.lower() == "a.txt":
        return [content.decode("utf-8-sig")]
    return [PROSE] if ".txt" in name.lower() else TEXTS


class Attempt:
    """Both readers on a file of its own."""

    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.stock, self.kind = AutoTokenizer.from_pretrained(tokenizer), load_tokenizer(tokenizer)
        self.refused = self.right = 0

    def __call__(self, name: str, content: bytes, expected: list[str] | None) -> str:
        """The message of a refusal, or nothing; ``expected`` None: it must be refused."""
        file = self.folder / name
        file.write_bytes(content)
        messages = [self.preprocessed(file, expected), self.evaluated(file, expected)]
        file.unlink()
        assert not os.listdir(self.folder), "something was left behind"
        assert bool(messages[0]) == bool(messages[1]), messages
        if not messages[0]:
            self.right += 1
            return ""
        self.refused += 1
        for message in messages:
            assert "\n" not in message and name in message, message
        return messages[0]

    def preprocessed(self, file: Path, expected: list[str] | None) -> str:
        try:
            _, prefix = run(self.folder, [str(file)], self.tokenizer)
        except UserError as error:
            return str(error)
        found = [self.kind.decode(ids[:-1]) for ids in documents(prefix)]
        assert expected is not None, f"{file.name}: read {len(found)} documents of a damaged file"
        assert found == [text for text in expected if text]
        for suffix in (".bin", ".idx", ".json"):
            os.remove(prefix + suffix)
        return ""

    def evaluated(self, file: Path, expected: list[str] | None) -> str:
        try:
            windows = token_windows(file, self.stock, 8, 2)
            everything = token_windows(file, self.stock, 1, None)
        except UserError as error:
            return str(error)
        assert expected is not None, f"{file.name}: evaluated"
        ids = [token for text in expected for token in [*self.kind.encode(text), self.kind.eod]]
        assert everything[:, 0].tolist() == ids[:-1]
        assert windows[0].tolist() == ids[:9]
        return ""


@pytest.fixture
def attempt(tmp_path, hf_tokenizer):
    return Attempt(tmp_path, hf_tokenizer)


def expected_of(name: str, content: bytes) -> list[str] | None:
    """None for a plain file that is no text or no JSON any more."""
    try:
        found = truth(name, content)
        ok = b"\0" not in content or name not in PLAIN
        return found if ok and all(isinstance(text, str) for text in found) else None
    except (ValueError, KeyError, TypeError):
        return None


@pytest.mark.parametrize("name", WHOLE)
def test_whole(attempt, name):
    assert attempt(name, WHOLE[name], truth(name, WHOLE[name])) == ""
    assert attempt(name.upper(), WHOLE[name], truth(name, WHOLE[name])) == ""


@pytest.mark.parametrize("name", WHOLE)
def test_cut(attempt, name):
    """Nowhere does a cut file of a format with an end pass for a whole one."""
    content, draw = WHOLE[name], random.Random(name)
    for size in sorted(draw.sample(range(len(content)), 25)):
        part = content[:size]
        message = attempt(name, part, expected_of(name, part) if name in PLAIN else None)
        if name == "a.jsonl" and message and part:
            assert f"a.jsonl:{part.count(10) + 1}: " in message


def test_cut_between_blocks_of_zstandard(attempt):
    """The frame's own reader sees no fault there."""
    parts = blocks(LINES.encode(), checksum=False)
    for kept in range(1, len(parts)):
        message = attempt("a.jsonl.zst", b"".join(parts[:kept]), None)
        assert "a.jsonl.zst: cannot be read: Compressed file ended before" in message
    assert attempt("a.jsonl.zst", b"".join(parts), TEXTS) == ""


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz"])
def test_evaluation_reads_an_archive_to_its_end(tmp_path, hf_tokenizer, name):
    """Where its first windows are enough, too: the checksum stands at the end."""
    file, stock = tmp_path / name, AutoTokenizer.from_pretrained(hf_tokenizer)
    file.write_bytes(WHOLE[name])
    assert len(token_windows(file, stock, 8, 2)) == 2
    for content in (WHOLE[name][:-1], WHOLE[name] + b"x"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            token_windows(file, stock, 8, 2)


def test_frames_in_a_row(attempt):
    content = LINES.encode()
    one, two = zst(content[:501]), zst(content[501:], checksum=False)
    for whole in (one + two, one + two + SKIPPABLE, one + zst(b"") + SKIPPABLE * 2 + two):
        assert attempt("a.jsonl.zst", whole, TEXTS) == ""
    for bad in (two[:-1], two + b"x", two + SKIPPABLE[:-1], two + b"\0" * 9):
        message = attempt("a.jsonl.zst", one + bad, None)
        assert "a.jsonl.zst: cannot be read" in message
    rows = gzip.compress(content[:501]), gzip.compress(content[501:])
    assert attempt("a.jsonl.gz", b"".join(rows), TEXTS) == ""
    for bad in (rows[0] + rows[1][:-1], b"".join(rows) + b"x", rows[0] + rows[1][:5]):
        assert "a.jsonl.gz: cannot be read" in attempt("a.jsonl.gz", bad, None)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "a.arrow"])
def test_bit_flipped(attempt, name):
    """A format with checksums gives what was written or nothing; a plain file what it holds."""
    content, draw = WHOLE[name], random.Random(name)
    for _ in range(40):
        place, damaged = draw.randrange(len(content)), bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        attempt(name, bytes(damaged), expected_of(name, bytes(damaged)))
    assert attempt.refused > 4 and (attempt.right > 4 or name not in PLAIN)


def test_no_page_of_a_parquet_file_is_passed_over(tmp_path):
    """Arrow skips pages of kinds that it does not have, so a damaged kind would lose rows."""
    file, content, lost = tmp_path / "a.parquet", WHOLE["a.parquet"], 0
    for place in [i for i, byte in enumerate(content) if byte == 0]:
        file.write_bytes(content[:place] + b"\x21" + content[place + 1 :])
        try:
            found = [text for _, text in read_documents(str(file), "text", DatasetOptions())]
            assert found == TEXTS, place
        except UserError as error:
            lost += "rows more than it has" in str(error)
    assert lost


def test_an_arrow_file_with_a_flipped_bit_is_read_or_refused(tmp_path, hf_tokenizer):
    """The format has no checksum, so that some other text is all that can be expected."""
    file, draw = tmp_path / "a.arrow", random.Random(1)
    for _ in range(40):
        damaged = bytearray(WHOLE["a.arrow"])
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            run(tmp_path, [str(file)], hf_tokenizer, overwrite=True)
        except UserError as error:
            assert "a.arrow" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", WHOLE)
def test_empty(attempt, name):
    assert attempt(name, b"", None)


@pytest.mark.parametrize("end", PACK)
def test_byte_order_marks_and_line_ends(attempt, end):
    windows_lines = LINES.replace("\n", "\r\n").encode()
    windows_prose = PROSE.replace("\n", "\r\n")
    pack = PACK[end]
    for content in (BOM + LINES.encode(), windows_lines, BOM + windows_lines, LINES.encode() + BOM):
        assert attempt(f"a.jsonl{end}", pack(content), TEXTS) == ""
    assert attempt(f"a.jsonl{end}", pack(LINES.strip().encode()), TEXTS) == ""
    assert attempt(f"a.jsonl{end}", pack(b"\n\r\n" + LINES.encode()), TEXTS) == ""
    assert attempt(f"a.txt{end}", pack(BOM + PROSE.encode()), [PROSE]) == ""
    assert attempt(f"a.txt{end}", pack(windows_prose.encode()), [windows_prose]) == ""
    for encoding in ("utf-16", "utf-16-le", "utf-32-be", "latin-1"):
        text = "caf\xe9 \n" if encoding == "latin-1" else LINES
        message = attempt(f"a.jsonl{end}", pack(text.encode(encoding)), None)
        assert f"a.jsonl{end}:1: not " in message
        message = attempt(f"a.txt{end}", pack(text.encode(encoding)), None)
        assert f"a.txt{end}: not " in message


@pytest.mark.parametrize("end", PACK)
def test_nulls(attempt, end):
    pack, good = PACK[end], '{"text": "x"}\n'
    where = f"a.jsonl{end}:2: "
    for line, message in {
        '{"text": null}': "'text' is not text",
        "null": "expected an object",
        '{"text": "a\0b"}': "byte 11 is zero",
        "\0" * 4096: "byte 0 is zero",
        '{"text": "\\ud800"}': "half a surrogate pair",
        "[" * 100_000: "not a JSON array",
        '{"text":' * 100_000: "not JSON",
        '{"text": "x", "n": ' + "9" * 5000 + "}": "not JSON",
    }.items():
        found = attempt(f"a.jsonl{end}", pack((good + line + "\n").encode()), None)
        assert where in found and message in found, found
    assert "byte 1 is zero" in attempt(f"a.txt{end}", pack(b"a\0b"), None)


def test_nulls_in_columns(attempt):
    texts = ["x", None, "y"]
    for name, content in {"a.parquet": parquet(texts), "a.arrow": arrow(texts)}.items():
        assert f"{name}:2: 'text' is not text" in attempt(name, content, None)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.JSON.ZST"])
def test_a_json_array_is_called_one(attempt, name):
    pack = PACK[Path(name).suffix.lower().replace(".json", "").replace("l", "")]
    rows = [{"text": "x"}, {"text": "y"}]
    for indent in (None, 2):
        content = json.dumps(rows, indent=indent).encode()
        for text in (content, BOM + b"\n" + content):
            assert "not a JSON array; `jq -c '.[]'`" in attempt(name, pack(text), None)
    message = attempt(name, pack(json.dumps(rows[0], indent=2).encode()), None)
    assert f"{name}:1: not JSON" in message and "one whole object" in message


def test_a_shard_without_rows_is_empty(tmp_path, hf_tokenizer):
    """As dumped by a job that had nothing to write; with the column, or without any."""
    (tmp_path / "0.parquet").write_bytes(parquet(TEXTS[:3]))
    (tmp_path / "1.parquet").write_bytes(parquet([]))
    pyarrow.parquet.write_table(pyarrow.table({}), tmp_path / "2.parquet")
    (tmp_path / "3.parquet").write_bytes(parquet(TEXTS[3:6]))
    (tmp_path / "4.arrow").write_bytes(arrow([]))
    (tmp_path / "5.PARQUET").write_bytes(parquet(TEXTS[6:7]))
    _, prefix = run(tmp_path, [str(tmp_path / "?.*")], hf_tokenizer)
    kind = load_tokenizer(hf_tokenizer)
    assert [kind.decode(ids[:-1]) for ids in documents(prefix)] == TEXTS[:7]
    for name in ("1.parquet", "2.parquet", "4.arrow"):
        with pytest.raises(UserError, match=f"{name}: no text, hence no tokens"):
            run(tmp_path, [str(tmp_path / name)], hf_tokenizer, "nothing")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "6.parquet")
    with pytest.raises(UserError, match="6.parquet:1: no key 'text' .* it has body"):
        run(tmp_path, [str(tmp_path / "6.parquet")], hf_tokenizer, "nothing")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_for_the_datasets_library_is_looked_at(tmp_path, hf_tokenizer, streaming):
    (tmp_path / "set").mkdir()
    parts = blocks(LINES.encode(), checksum=False)
    (tmp_path / "set" / "train.jsonl.zst").write_bytes(b"".join(parts[:2]))
    options = DatasetOptions(streaming=streaming)
    with pytest.raises(UserError, match="train.jsonl.zst: cannot be read"):
        run(tmp_path, [f"hf:{tmp_path / 'set'}"], hf_tokenizer, dataset=options)


def _ended(*_):
    os._exit(1)


def test_a_worker_that_is_ended(tmp_path, hf_tokenizer, monkeypatch):
    """As the kernel does where memory is short."""
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr("megatron_attnedit.data.preprocess._encode", _ended)
    with pytest.raises(UserError, match="--workers 2: one of them was ended"):
        run(tmp_path, [str(tmp_path / "a.txt")], hf_tokenizer, workers=2)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_outputs_are_prefixes(tmp_path, hf_tokenizer):
    (tmp_path / "a.txt").write_text("x")
    for suffix in (".bin", ".idx"):
        with pytest.raises(UserError, match=f"the prefix .*/out, without {suffix}"):
            run(tmp_path, [str(tmp_path / "a.txt")], hf_tokenizer, f"out{suffix}")


def test_the_tool_refuses_a_cut_archive(tmp_path, hf_tokenizer):
    file = tmp_path / "A.JSONL.ZST"
    file.write_bytes(WHOLE["a.jsonl.zst"][:-20])
    flags = ["--input", file, "--tokenizer", hf_tokenizer, "--output", tmp_path / "out"]
    done = call_tool("tools/preprocess_data.py", *flags)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {file}: cannot be read: ")
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == [file.name]
    file.write_bytes(WHOLE["a.jsonl.zst"])
    assert call_tool("tools/preprocess_data.py", *flags).returncode == 0
