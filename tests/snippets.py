"""Runs the snippets of documentation pages: test_docs.py and test_readme.py use it, and it is a script as well:

    python tests/snippets.py docs/serve.md --have transformers

In a page, in its order and in one temporary directory:

- ```python runs in one namespace a page;
- ```sh: ``inq`` commands run, in this process; but ``inq demo`` and ``inq bench``, which take minutes, are parsed only.
  Of ``make`` the targets and variables must exist, of ``python`` and ``torchrun`` the script, of ``pip install`` our
  extras. Anything else is an error;
- an HTML comment that begins with "prelude" is Python that runs at its place: what the page's reader has already;
- ``<!-- needs: transformers -->`` in the line before a fence, or ``<!-- prelude needs: transformers``: the snippet runs
  only where the caller has that, in an environment of its own (INQ_DOCS_HAVE for test_docs.py) or in a test that says
  so in ``NEEDS``;
- ``<!-- from: tests/server.py -->`` there: the snippet does not run; its lines are that file's, which a test runs.

Code that is indented instead of fenced would escape, and is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

from inq_kernels import cli

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = {"python", "sh", "text", "json", "toml", "cpp", "diff", "prototxt", ""}
# What a mark may name. Two processes (torchrun) are tests/integrations/test_tensor_parallel.py's, a compiler that takes
# a minute (aotinductor) pt2_cpp.py's. vLLM's compiled parts are nowhere: such a snippet is only compiled.
NEEDS = {"transformers", "compressed-tensors", "peft", "torchrun", "aotinductor", "vllm"}
LONG = {"demo", "bench"}

_PIECE = re.compile(
    r"^<!-- prelude(?: needs: (?P<prelude_needs>[^\n]*?))?\n(?P<prelude>.*?)^-->[ ]*$"
    r"|(?:^<!-- (?:needs: (?P<needs>[^\n]*?)|from: (?P<source>[^\n]*?)) -->\n)?"
    r"^```(?P<language>[^\n]*)\n(?P<body>.*?)^```[ ]*$",
    re.MULTILINE | re.DOTALL,
)


class Broken(AssertionError):
    """A snippet does not work: the message says where and how."""


@dataclass(frozen=True)
class Snippet:
    """``line`` is that of its first line in the page."""

    page: Path
    line: int
    language: str
    body: str
    needs: frozenset[str]
    source: str | None = None

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


def read(page: Path) -> list[Snippet]:
    """The preludes (language "prelude") and fenced blocks of a page. Raises Broken for what it does not know."""
    text, found = page.read_text(), []
    for piece in _PIECE.finditer(text):
        prelude = piece["prelude"] is not None
        body = piece["prelude"] if prelude else piece["body"]
        line = text.count("\n", 0, piece.start("prelude" if prelude else "body")) + 1
        language = "prelude" if prelude else piece["language"].strip()
        needs = frozenset((piece["prelude_needs"] or piece["needs"] or "").replace(",", " ").split())
        if not prelude and language not in LANGUAGES:
            raise Broken(f"{page.name}:{line}: expected one of {sorted(LANGUAGES)} after the fence, got {language!r}")
        if unknown := needs - NEEDS:
            raise Broken(f"{page.name}:{line}: expected needs among {sorted(NEEDS)}, got {sorted(unknown)}")
        found.append(Snippet(page, line, language, body, needs, piece["source"]))
    # A mark that stands elsewhere than before a fence would be taken for none.
    marks, used = (
        re.findall(r"<!--\s*(?:needs|prelude|from)\b", text),
        sum(bool(s.needs) or s.language == "prelude" or s.source is not None for s in found),
    )
    if len(marks) != used:
        raise Broken(
            f"{page.name}: expected every needs, from and prelude where it counts, got {len(marks)} and use for {used}"
        )
    without = _PIECE.sub(lambda piece: "-\n" * piece[0].count("\n") + "-", text)
    if indented := re.search(r"(?:\A|\n[ ]*\n)(?: {4}|\t)\s*(\S.*)", without):
        line = text.count("\n", 0, indented.start(1)) + 1
        raise Broken(f"{page.name}:{line}: expected code in a fence, got an indented line: {indented[1]}")
    return found


def run(page: Path, folder: Path, have: Iterable[str] = (), scope: dict | None = None) -> int:
    """Run a page's snippets in ``folder``, with what needs nothing but ``have``; how many ran.

    Args:
        page: a Markdown file.
        folder: the working directory.
        have: the libraries that are there, of ``NEEDS``.
        scope: the namespace to begin with; it is changed.
    """
    scope, ran = {"__name__": "__main__"} if scope is None else scope, 0
    before = Path.cwd()
    os.chdir(folder)
    try:
        for snippet in read(page):
            if not snippet.needs <= set(have):
                if snippet.language in ("python", "prelude"):
                    compiled(snippet)
                continue
            if snippet.source is not None:
                check_excerpt(snippet)
            elif snippet.language in ("python", "prelude"):
                run_python(snippet, scope)
            elif snippet.language == "sh":
                run_sh(snippet)
            else:
                continue
            ran += 1
    finally:
        os.chdir(before)
    return ran


def check_excerpt(snippet: Snippet) -> None:
    """Its lines are in the file that it is from, in that order. Raises Broken."""
    lines = iter((ROOT / snippet.source).read_text().splitlines())
    theirs = (line.strip() for line in lines)
    for line in filter(None, map(str.strip, snippet.body.splitlines())):
        if line not in theirs:
            raise Broken(f"{snippet.where}: expected lines of {snippet.source} in their order, got {line!r}")


def run_python(snippet: Snippet, scope: dict) -> None:
    """Exceptions come through with the page's line in their traceback."""
    exec(compiled(snippet), scope)


def compiled(snippet: Snippet) -> CodeType:
    """With the page's lines. Raises SyntaxError."""
    return compile("\n" * (snippet.line - 1) + snippet.body, str(snippet.page), "exec")


def run_sh(snippet: Snippet) -> list[list[str]]:
    """The commands that ran, in words."""
    ran = []
    for number, line in enumerate(snippet.body.replace("\\\n", "  ").splitlines()):
        where = f"{snippet.page.name}:{snippet.line + number}"
        words = shlex.split(line, comments=True)
        environment = {}
        if words[:1] == ["export"]:
            continue
        while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if words and _command(where, words, environment):
            ran.append(words)
    return ran


def _command(where: str, words: list[str], environment: dict[str, str]) -> bool:
    """Whether the command was run, and not only looked at."""
    program, *rest = words
    if program == "inq":
        return _inq(where, rest, environment)
    if program == "make":
        _make(where, rest)
    elif program == "pip" or words[:3] == ["python", "-m", "pip"]:
        _pip(where, words)
    elif program in ("python", "python3", "torchrun"):
        _script(where, rest)
    else:
        raise Broken(f"{where}: expected inq, make, pip, python or torchrun, got {program!r}")
    return False


def _inq(where: str, words: list[str], environment: dict[str, str]) -> bool:
    output, errors = io.StringIO(), io.StringIO()
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            if words[:1] and words[0] in LONG:
                try:
                    cli._parser(words).parse_args(words)
                    return False
                except SystemExit as stop:
                    status = stop.code
            else:
                status = cli.main(words)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    if status != 0:
        raise Broken(
            f"{where}: inq {shlex.join(words)}: exit status {status}: {errors.getvalue() or output.getvalue()}"
        )
    return True


def _make(where: str, words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([A-Za-z][A-Za-z0-9_-]*):", text, re.MULTILINE))
    variables = set(re.findall(r"\$[({](\w+)[)}]", text))
    for word in words:
        name, assigned, _ = word.partition("=")
        known = variables if assigned else targets
        if name not in known:
            raise Broken(f"{where}: make {word}: expected {'a variable' if assigned else 'a target'} of the Makefile")


def _pip(where: str, words: list[str]) -> None:
    if "install" not in words:
        raise Broken(f"{where}: expected pip install, got {shlex.join(words)}")
    text = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", text.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    for word in words:
        if (ours := re.fullmatch(r"(?:inq_kernels|\.)\[([\w,]+)\].*", word)) and (
            odd := set(ours[1].split(",")) - extras
        ):
            raise Broken(f"{where}: expected extras of pyproject.toml, got {sorted(odd)}")


def _script(where: str, words: list[str]) -> None:
    if words[:1] == ["-m"]:
        words = words[2:]
    scripts = [word for word in words if word.endswith(".py") and not word.startswith("-")]
    if not scripts or not (ROOT / scripts[0]).is_file():
        raise Broken(f"{where}: expected a script of the repository, got {shlex.join(words)}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the snippets of documentation pages.")
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--have", nargs="+", choices=sorted(NEEDS), default=[])
    args = parser.parse_args()
    for page in args.pages:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{page}: {run(page.resolve(), Path(folder), args.have)} snippets ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
