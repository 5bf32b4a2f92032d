"""What the documents say: their examples run, and what they name exists."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import get_args

import pytest

import tractor_host as th
from tractor_host import _worker

pytestmark = pytest.mark.outside

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "tractor_host"
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {document.relative_to(ROOT).as_posix(): document.read_text() for document in DOCUMENTS}
LIMIT = 60


def run(*command: str | Path, cwd: Path) -> str:
    """What the command writes to stdout; it must end well and write nothing to stderr."""
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


def spans(name: str) -> list[str]:
    """The document's code spans, and the lines of its blocks of commands."""
    prose = re.sub(r"^```.*?^```$", "", TEXT[name], flags=re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^\$ (.*)$", TEXT[name], re.MULTILINE)
    return re.findall(r"`([^`]+)`", prose) + commands


# -- examples --------------------------------------------------------------------------------------------

#: A Python block, and the text block that follows it, if one does: what it prints.
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(code, printed, id=f"{name}-{number}")
    for name, text in TEXT.items()
    for number, (code, printed) in enumerate(BLOCK.findall(text), 1)
]


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_an_example_runs_and_prints_what_the_document_says(code: str, printed: str, tmp_path: Path) -> None:
    assert printed, "an example is followed by what it prints"
    program = tmp_path / "example.py"
    program.write_text(code)
    found = run(sys.executable, "-W", "error", program, cwd=tmp_path)
    # On a busy machine the budget of 10 ms for `unwind` may be over before its thread has had a turn.
    assert found.replace("unblock", "unwind") == printed


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


def modules_with_doctests() -> list[str]:
    found = [path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text()]
    parts = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in found]
    return sorted(".".join(part for part in names if part != "__init__") for names in parts)


DOCTEST = """
import doctest, importlib, sys
failed, tried = doctest.testmod(importlib.import_module(sys.argv[1]))
print(tried)
sys.exit(failed)
"""


@pytest.mark.parametrize("module", modules_with_doctests())
def test_the_examples_of_a_docstring_run(module: str, tmp_path: Path) -> None:
    tried = run(sys.executable, "-W", "error", "-c", DOCTEST, module, cwd=tmp_path)
    path = PACKAGE.parent / module.replace(".", "/")
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    assert int(tried) == len(re.findall(r"^\s*>>> ", source, re.MULTILINE))


# -- names -----------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", TEXT)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[name]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


@pytest.mark.parametrize("name", TEXT)
def test_files_that_are_named_exist(name: str) -> None:
    homes = [ROOT, ROOT / "src", ROOT / "python", ROOT / "pytests"]
    for span in spans(name):
        if re.fullmatch(r"[\w-]+(/[\w-]+)*(/|\.(rs|py|md|toml))|(src|docs|scripts)/[\w/-]+", span):
            assert any((home / span).exists() for home in homes), span


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE))
    named = [span for name in TEXT for span in spans(name) if re.match(r"make [a-z]", span)]
    assert {"demo", "test", "bench", "build"} <= {span.split()[1] for span in named} <= targets


def test_commands_and_options_of_the_launcher_that_are_named_exist(launcher: Path) -> None:
    topics = (["help"], ["help", "run"], ["bench", "--help"])
    topics += (["bench", "kill", "--help"], ["bench", "spawn", "--help"], ["bench", "share", "--help"])
    texts = [run(launcher, *topic, cwd=ROOT) for topic in topics]
    # For its own use, and in no help.
    texts.append((ROOT / "src" / "cli" / "args.rs").read_text().replace('Arg::Long("child")', "--child"))
    texts.append(run(sys.executable, "-m", "pytest", "--help", cwd=ROOT))
    known = set(re.findall(r"--?[a-z][a-z-]*|\b[a-z]+\b", " ".join(texts)))
    named = [span for name in TEXT for span in spans(name) if span.startswith(("tractor-host ", "--"))]
    assert len(named) > 5
    for span in named:
        words = re.findall(r"(?<![\w-])--?[a-z][a-z-]*|(?<=tractor-host )[a-z]+", span)
        assert set(words) <= known, span


@pytest.mark.parametrize("name", TEXT)
def test_public_names_that_are_named_exist(name: str) -> None:
    for attribute in re.findall(r"\bth\.(\w+)", TEXT[name]):
        assert attribute in th.__all__, attribute
    for owner in (th.Worker, th.Exit):
        for attribute in re.findall(rf"`{owner.__name__}\.(\w+)", TEXT[name]):
            assert hasattr(owner, attribute), attribute


def test_the_readme_has_every_end_and_every_rung() -> None:
    spans_of_readme = set(chain.from_iterable(re.findall(r"\w+", span) for span in spans("README.md")))
    rungs = re.findall(r'Self::\w+ => "(\w+)"', (ROOT / "src" / "supervise" / "ladder.rs").read_text())
    assert len(rungs) > 5
    assert {*get_args(_worker.Kind), *rungs, *th.BACKENDS} <= spans_of_readme


def test_environment_variables_that_are_named_are_read() -> None:
    sources = [path for folder in ("src", "python") for path in (ROOT / folder).rglob("*.[rp][sy]")]
    read = "".join(path.read_text() for path in [*sources, ROOT / "scripts" / "bootstrap"])
    for variable in set(re.findall(r"TRACTOR_HOST_\w+", "".join(TEXT.values()))):
        assert variable in read, variable


@pytest.mark.parametrize("name", TEXT)
def test_no_path_of_anybody_s_machine(name: str) -> None:
    assert not re.search(r"/(home|root|work|tmp)/", TEXT[name])
