"""Every snippet of the documentation runs, every link leads somewhere, every quoted message is one of ours.

INQ_DOCS_HAVE="transformers peft" runs the snippets that need those too, and only pages that have such ones.
"""

import ast
import os
import re
from functools import cache

import pytest
import snippets
import torch
from support import compiles

ROOT = snippets.ROOT
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "SECURITY.md"]
HAVE = frozenset(os.environ.get("INQ_DOCS_HAVE", "").split())


def needed(page):
    return frozenset().union(*(snippet.needs for snippet in snippets.read(page)))


# With INQ_DOCS_HAVE only what the main environment could not run.
RUN = [page for page in PAGES if not HAVE or needed(page) & HAVE]


@compiles
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.export's own
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets(page, tmp_path, capsys):
    assert HAVE <= snippets.NEEDS
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.manual_seed(0)
    try:
        snippets.run(page, tmp_path, HAVE)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def test_the_readme_is_known():
    """test_readme.py runs its snippets, since it gives them a model."""
    languages = {snippet.language for snippet in snippets.read(ROOT / "README.md")}
    assert languages >= {"python", "sh"}


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(text):
    """GitHub's names of headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    names = []
    for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        names.append(name if name not in names else f"{name}-{names.count(name)}")
    return set(names)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if target.startswith(("https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}"
        assert path.resolve().is_relative_to(ROOT), f"{page.name}: {target} leads out of the repository"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{page.name}: {target}: no such heading"


# --- messages ---------------------------------------------------------------------------------------------------------


def joined(node):
    """The text of a string expression, with \\0 for what is not known before it runs; None if it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
        left, right = joined(node.left), joined(node.right)
        if left is not None or right is not None:
            return f"{left or chr(0)}{right or chr(0)}"
    return None


@cache
def messages():
    """Every string in the package, and those of the C++ sources that reach Python."""
    found = []
    for folder in ("inq_kernels", "bench", "triton_ops"):
        for path in (ROOT / folder).rglob("*.py"):
            found += [text for node in ast.walk(ast.parse(path.read_text())) if (text := joined(node)) is not None]
    for path in (ROOT / "csrc").glob("*.cpp"):
        # Adjacent literals are one.
        text = re.sub(r'"\s*\n\s*"', "", path.read_text())
        found += re.findall(r'"((?:[^"\\\n]|\\.)*)"', text)
    return found


def is_ours(quoted):
    """Whether a message as a page quotes it, with … for what differs, can come from one string of the source."""
    fragments = [fragment for fragment in quoted.split("…") if fragment.strip(" :,.")]
    if not fragments or len(max(fragments, key=len)) < 9:
        return False
    pattern = re.compile(".*".join(map(re.escape, fragments)), re.DOTALL)
    return any(pattern.search(text) for text in messages())


TROUBLE = ROOT / "docs" / "troubleshooting.md"


def quoted_messages():
    return re.findall(r"^#### `(.*)`$", TROUBLE.read_text(), re.MULTILINE)


def test_every_quoted_message_is_in_the_source():
    quoted = quoted_messages()
    assert len(quoted) > 40
    assert len(set(quoted)) == len(quoted)
    strange = [message for message in quoted if not is_ours(message)]
    assert not strange, "\n".join(strange)


def test_every_message_has_a_cause_and_a_remedy():
    text = TROUBLE.read_text()
    for message, body in re.findall(r"^#### `(.*)`\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL):
        assert "**Remedy**" in body, message
        assert len(body.partition("**Remedy**")[0].strip()) > 20, f"{message}: no cause"


@pytest.mark.parametrize(
    "quoted",
    [
        "expected weights without flaws, got …",
        "inq.INQ: weight of layer …: expected nothing at all",
        "expected",
        "…",
    ],
)
def test_a_message_that_nobody_prints_is_found(quoted):
    assert not is_ours(quoted)


# --- the runner itself ------------------------------------------------------------------------------------------------


def page_of(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


def test_a_page_is_one_namespace_in_one_directory(tmp_path):
    page = page_of(
        tmp_path,
        "<!-- prelude\nx = 1\n-->\n```python\ny = x + 1\nopen('made', 'w').close()\n```\n\n"
        "```python\nassert (x, y) == (1, 2)\n```\n```text\nnot run\n```\n```sh\ninq doctor  # and a comment\n```\n",
    )
    (tmp_path / "folder").mkdir()
    assert snippets.run(page, tmp_path / "folder") == 4
    assert (tmp_path / "folder" / "made").exists()


def test_lines_of_another_file_are_compared_with_it(tmp_path):
    text = "1. A list:\n\n   on\n\n<!-- from: tests/pt2_server.py -->\n```python\nimport sys\n\nimport torch\n```\n"
    assert snippets.run(page_of(tmp_path, text), tmp_path) == 1
    text = text.replace("import sys\n\nimport torch", "import torch\nimport sys")
    with pytest.raises(snippets.Broken, match="in their order, got 'import sys'"):
        snippets.run(page_of(tmp_path, text), tmp_path)


def test_what_needs_a_library_waits_for_it(tmp_path):
    page = page_of(tmp_path, "<!-- needs: transformers -->\n```python\nraise KeyError\n```\n```python\nx = 1\n```\n")
    assert snippets.run(page, tmp_path) == 1
    with pytest.raises(KeyError):
        snippets.run(page, tmp_path, ["transformers"])
    # What runs nowhere is Python all the same.
    with pytest.raises(SyntaxError, match="page.md, line 3"):
        snippets.run(page_of(tmp_path, "<!-- needs: vllm -->\n```python\nllm = LLM(\n```\n"), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- needs: tensorflow -->\n```python\n```\n",
            r"page.md:3: expected needs among .*'transformers'.*tensorflow",
        ),
        ("<!-- needs: transformers -->\n\n```python\n```\n", "expected every needs, from and prelude where it counts"),
        ("Text:\n\n    inq doctor\n\n", "page.md:3: expected code in a fence, got an indented line: inq doctor"),
        (
            "<!-- from: tests/pt2_server.py -->\n```python\ntorch.ops.load_library(other)\n```\n",
            r"page.md:3: expected lines of tests/pt2_server.py in their order, got 'torch.ops.load_library\(other\)'",
        ),
        ("```bash\nls\n```\n", "page.md:2: expected one of .*, got 'bash'"),
        ("```sh\nls\n```\n", "page.md:2: expected inq, make, pip, python or torchrun, got 'ls'"),
        (
            "```sh\n\ninq verify nowhere\n```\n",
            "page.md:3: inq verify nowhere: exit status 1: inq: error: nowhere: expected",
        ),
        ("```sh\ninq bench --no-such-option\n```\n", "inq bench --no-such-option: exit status 2"),
        ("```sh\nmake everything\n```\n", "make everything: expected a target of the Makefile"),
        ("```sh\nmake test PYTETS=-x\n```\n", "make PYTETS=-x: expected a variable of the Makefile"),
        ('```sh\npip install "inq_kernels[gpu]"\n```\n', r"expected extras of pyproject.toml, got \['gpu'\]"),
        ("```sh\ntorchrun --nproc-per-node 2 examples/nothing.py\n```\n", "expected a script of the repository"),
        ("```python\n1 +\n```\n", "page.md, line 2"),
    ],
)
def test_what_does_not_work_is_said(tmp_path, text, message):
    with pytest.raises((snippets.Broken, SyntaxError)) as caught:
        snippets.run(page_of(tmp_path, text), tmp_path)
    assert re.search(message, str(caught.value)), caught.value


def test_an_error_has_the_line_of_the_page(tmp_path):
    page = page_of(tmp_path, "# Title\n\n```python\nx = 1\n\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        snippets.run(page, tmp_path)
    assert caught.traceback[-1].lineno + 1 == 6


def test_headings_and_their_anchors(tmp_path):
    assert anchors("# One two\n## `inq bench`: what?\n```sh\n# no heading\n```\n## One two\n") == {
        "one-two", "inq-bench-what", "one-two-1",
    }  # fmt: skip
