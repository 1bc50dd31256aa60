"""The pages: links, lengths, commands, generated flags; and the site, where its extra is."""

import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.benchmark import flags_page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MAX_WORDS, MAX_ROWS, MAX_CLICKS = 90, 15, 3
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)")
FENCE = re.compile(
    r"(?:<!-- (?P<needs>needs: [^>]*) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)```", re.S
)
LONG_TABLES = ("reference", "data")  # and the diary
PROGRAMS = ("python", "bash", "torchrun", "sbatch", "srun", "mkdocs")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"<!--.*?-->", "", FENCE.sub("\n\n", text), flags=re.S)


def blocks(page: Path) -> Iterator[str]:
    """Paragraphs, items of lists and tables."""
    for block in re.split(r"\n\s*\n", without_code(page.read_text())):
        yield from re.split(r"\n(?=\s*(?:[-*]|\d+\.)\s)", block.strip())


@functools.cache
def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#{1,6} (.*)$", without_code(page.read_text()), re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading.strip()) for heading in plain}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    for target, anchor in LINK.findall(page.read_text()):
        yield (page.parent / target).resolve() if target else page, anchor


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=name)
def test_links_and_anchors_lead_somewhere(page):
    for target, anchor in links(page):
        assert target.exists(), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(target), f"{name(page)}: #{anchor}"


def test_every_page_is_at_most_three_clicks_from_the_index():
    seen, edge = {DOCS / "index.md"}, {DOCS / "index.md"}
    for _ in range(MAX_CLICKS):
        edge = {
            target for page in edge for target, _ in links(page) if target.suffix == ".md"
        } - seen
        seen |= edge
    assert set(PAGES) <= seen


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name)
def test_paragraphs_and_tables_are_short(page):
    may_be_long = page.parent.name in LONG_TABLES or page.name == "log.md"
    for block in blocks(page):
        if block.startswith("|"):
            assert may_be_long or block.count("\n") - 1 <= MAX_ROWS, f"{name(page)}: {block[:80]}"
        else:
            assert len(block.split()) <= MAX_WORDS, f"{name(page)}: {block[:80]}"


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """What a command needs, if that is said, and its words."""
    for fence in FENCE.finditer(page.read_text()):
        if fence["language"]:
            continue
        for line in fence["body"].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words and words[0] in PROGRAMS:
                yield fence["needs"] or "", words


@functools.cache
def text_of_tests() -> str:
    """All tests but this one."""
    files = (p for p in (ROOT / "tests").rglob("*") if p.suffix in (".py", ".sh"))
    return "\n".join(p.read_text() for p in files if p != Path(__file__))


@functools.cache
def source_of(module: str) -> str:
    """Text of a module, of all of its package if it is one."""
    path = ROOT / module.replace(".", "/")
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return "\n".join(file.read_text() for file in files)


@functools.cache
def known_flags(tool: str) -> set[str]:
    parsers = [*flags_page.commands(flags_page.parser_of(tool)).values()]
    if tool.startswith("pretrain"):
        parsers.append(flags_page.parser_of(f"{tool} --dry-run"))
    return {flag for parser in parsers for flag in parser._option_string_actions} | {"--dry-run"}


def unknown(words: list[str]) -> list[str]:
    """What of a command is not there: its program, or a flag of a tool."""
    if "-m" in words:
        module = words[words.index("-m") + 1]
        if module.startswith("tools.") or module.startswith("tests."):
            flags = {word.split("=")[0] for word in words if word.startswith("--")}
            text = source_of(module) + source_of("tools.benchmark")
            known = {f for f in flags if f in text or f[2:].replace("-", "_") in text}
            known |= known_flags("pretrain_stage1") | {"--nproc-per-node"}
            return sorted(flags - known)
        return [word for word in words if word.startswith("tests/") and not (ROOT / word).exists()]
    paths = [
        w for w in words if re.match(r"(tools|examples|tests)/[\w/]+\.(py|sh|sbatch|yaml)$", w)
    ]
    missing = [path for path in paths if not (ROOT / path).exists()]
    tools = [Path(path).stem for path in paths if path.startswith("tools/")]
    if tools and not missing:
        flags = {word.split("=")[0] for word in words[words.index(f"tools/{tools[0]}.py") :]}
        missing += [f for f in flags if f.startswith("--") and f not in known_flags(tools[0])]
    return missing


def in_a_test(words: list[str]) -> bool:
    """Tests name the command's program."""
    if words[:2] == ["python", "-c"] or words[0] == "mkdocs":
        return True
    if "-m" in words:
        module = words[words.index("-m") + 1]
        return module == "pytest" or module in text_of_tests()
    program = next(w for w in words if re.match(r"(tools|examples|tests)/.*\.(py|sh|sbatch)$", w))
    return Path(program).stem in text_of_tests()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name)
def test_commands_are_those_of_the_tools_and_of_the_tests(page):
    for needs, words in commands(page):
        assert unknown(words) == [], f"{name(page)}: {' '.join(words)}"
        assert needs or in_a_test(words), f"{name(page)}: in no test: {' '.join(words)}"


def test_a_planted_command_is_found():
    assert unknown(["python", "tools/plan.py", "--no-such-flag"]) == ["--no-such-flag"]
    assert unknown(["bash", "examples/gone.sh"]) == ["examples/gone.sh"]
    assert not in_a_test(["python", "-m", "tools.benchmark.no_such"])


WORDS = re.compile(
    r"\b(far sight|first weights|behind the training|own states|words on this rank|GB beyond|"
    r"of it exposed|utilisation|grids?|goes on|anew)\b"
)
OLD_NAMES = re.compile(
    r"\b(ParamRow|KeptNumbers|Opened|Recorded|LegacyGrid|blame|called_as_a_whole|send_nothing|"
    r"reduce_apart|BARS|param_rows|Traffic)\b|--record\b|--student-input-"
)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name)
def test_words_are_those_of_the_field(page):
    text = re.sub(r"`[^`\n]*`", "", without_code(page.read_text()))
    assert WORDS.findall(text) == [], name(page)


def test_old_names_are_gone():
    """But for the one file that accepts old flags."""
    for folder in ("megatron_attnedit", "tools", "docs"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".md"):
                assert not OLD_NAMES.search(file.read_text()), name(file)


def test_flags_are_those_of_the_tools():
    """After a flag has changed: python -m tools.benchmark.flags_page."""
    assert (DOCS / "reference" / "flags.md").read_text() == flags_page.page()


def test_the_site_builds_without_warnings(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("MkDocs Material is not installed: pip install -e '.[docs]'")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", ".mkdocs.yml"]
    built = subprocess.run([*words, "-d", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "index.html").is_file()
