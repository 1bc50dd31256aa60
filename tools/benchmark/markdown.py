"""Tables in Markdown, and the pages between whose marks they stand."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_attnedit.files import write_output


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of a table; a row has as many cells as the header."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page."""
    before, _, rest = page.read_text().partition(begin)
    write_output(page, f"{before}{begin}{text}{end}{rest.partition(end)[2]}")
