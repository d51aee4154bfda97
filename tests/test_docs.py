"""What the documents point to is there: files, tests, anchors; and the index names all of them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import cm_train

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
LINK = re.compile(r"(?:\]\(|src=\")([^)\"\s]+)")
TEST = re.compile(r"`(tests/[\w/]+\.py)`")


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    dead = []
    for document in DOCUMENTS:
        for link in LINK.findall(document.read_text()):
            if link.startswith(("http:", "https:")):
                continue
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            if not target.exists() or (anchor and anchor not in anchors(target)):
                dead.append(f"{document.relative_to(ROOT)}: {link}")
    assert not dead


def test_tests_that_documents_name_are_there():
    named = {(document.name, test) for document in DOCUMENTS for test in TEST.findall(document.read_text())}
    assert len(named) > 20
    assert not [(document, test) for document, test in named if not (ROOT / test).is_file()]


def test_proofs_name_tests_that_there_are():
    """A row of docs/proofs.md ends with `file`: `test`."""
    functions: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        found = {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}
        functions[path.stem] = functions.get(path.stem, set()) | found
    rows = re.findall(r"`(test_\w+)`: `(test_\w+)` \|$", (ROOT / "docs" / "proofs.md").read_text(), re.MULTILINE)
    assert len(rows) > 40
    assert not [(file, test) for file, test in rows if test not in functions.get(file, ())]


def test_index_names_every_document():
    index = (ROOT / "docs" / "README.md").read_text()
    assert not [d.name for d in (ROOT / "docs").glob("*.md") if d.name != "README.md" and f"]({d.name})" not in index]


def test_package_has_a_version_and_lists_what_it_offers():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", cm_train.__version__)
    assert set(cm_train.__all__) <= set(dir(cm_train))
    assert all(getattr(cm_train, name) for name in cm_train.__all__)


def test_package_lists_nothing_else_and_imports_little_for_it():
    listed = "import cm_train, sys; print(*(name for name in dir(cm_train) if name[0] != '_'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*sorted(name for name in cm_train.__all__ if name[0] != "_"), "False"]
    assert set(cm_train._HOMES) == set(cm_train.__all__) - {"__version__"}
    assert all(getattr(cm_train, name).__doc__ for name in cm_train._HOMES)
