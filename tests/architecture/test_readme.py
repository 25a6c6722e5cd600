"""README.md's file tree is true: what it names exists, and no top-level directory is left out.

The tree is the first fenced block after the heading "File tree": one path a line, indented under
its directory (by spaces or tree glyphs), a description after at least two spaces.
"""

import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREE = re.compile(r"^#+ File tree\s*\n.*?^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def tree_paths(readme: str) -> list[str]:
    """The paths of the file tree, relative to the root, in their order."""
    block = TREE.search(readme)
    if block is None:
        raise ValueError("README.md has no fenced block after a heading 'File tree'")
    paths: list[str] = []
    parents: list[tuple[int, str]] = []  # column and path of the open directories
    for line in block.group(1).splitlines():
        bare = re.sub(r"[│├└─|]", " ", line)
        if not bare.strip():
            continue
        column = len(bare) - len(bare.lstrip())
        name = re.split(r"\s{2,}|\s#", bare.strip())[0]
        while parents and parents[-1][0] >= column:
            parents.pop()
        path = parents[-1][1] + name if parents else name
        paths.append(path)
        if name.endswith("/"):
            parents.append((column, path))
    return paths


def top_level_directories(root: Path) -> set[str]:
    """Directories of the repository, without hidden ones (but .ci) and what .gitignore names."""
    lines = (root / ".gitignore").read_text(encoding="utf-8").split()
    ignored = [line.strip("/") for line in lines]
    return {
        path.name
        for path in root.iterdir()
        if path.is_dir()
        and (path.name == ".ci" or not path.name.startswith("."))
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
        and any(path.iterdir())
    }


@pytest.fixture(scope="module")
def paths() -> list[str]:
    return tree_paths((ROOT / "README.md").read_text(encoding="utf-8"))


def test_parser_reads_indentation_and_glyphs() -> None:
    tree = "a/           the first\n  b/\n    c.py     what c is\n  d.py\ne.toml  # last\n"
    glyphs = "a/\n├── b/    words\n│   └── c.py\n└── d.py\ne.toml\n"
    for block in (tree, glyphs):
        found = tree_paths(f"# x\n\n## File tree\n\nWords.\n\n```text\n{block}```\n")
        assert found == ["a/", "a/b/", "a/b/c.py", "a/d.py", "e.toml"]
    with pytest.raises(ValueError, match="File tree"):
        tree_paths("# x\n")


def test_tree_names_only_what_exists(paths: list[str]) -> None:
    missing = [
        path
        for path in paths
        if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())
    ]
    assert paths
    assert not missing, f"README.md's file tree names what is not there: {missing}"


def test_tree_names_every_top_level_directory(paths: list[str]) -> None:
    named = {path.split("/")[0] for path in paths}
    left_out = top_level_directories(ROOT) - named
    assert not left_out, f"README.md's file tree leaves out {sorted(left_out)}"
