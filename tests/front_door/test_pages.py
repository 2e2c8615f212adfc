"""What the pages for newcomers say of the code: links, names of functions, imports of rooms, the version."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import ett

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for pattern in ("*.md", "*_ett/*.md", "train/*.md", "docs/*.md") for path in ROOT.glob(pattern))
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
ROOM = r"^\| \[`(\w+)`\]\(.*?\) \| .*? \| (nothing|every room|`\w+`(?:, `\w+`)*) \|$"
ROOMS = dict(re.findall(ROOM, ARCHITECTURE, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_function_of_the_walk_is_in_its_file():
    rows = re.findall(r"^\| \[`\S+`\]\((\S+)\) \| (`.*?`) \|", ARCHITECTURE, re.MULTILINE)
    assert len(rows) > 30
    for link, names in rows:
        code = (ROOT / "docs" / link).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"^\s*(def|class) {part}\b", code, re.MULTILINE), f"{name} is not in {link}"


def imports(path: Path) -> set[str]:
    """The rooms that a file imports, anywhere in it."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in nodes if not node.level for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("ett.")} & ROOMS.keys()


def test_rooms_import_what_the_architecture_says():
    assert len(ROOMS) == 10
    told = {room: set(re.findall(r"\w+_ett|train|hub_cards", text)) for room, text in ROOMS.items()}
    found = {room: set().union(*map(imports, (ROOT / room).rglob("*.py"))) - {room} for room in ROOMS if room != "ett"}
    assert found == {room: names for room, names in told.items() if room != "ett"}


def test_the_citation_has_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ett.__version__
