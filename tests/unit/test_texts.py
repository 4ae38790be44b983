"""Every node has a help page and its texts in English and in Simplified Chinese."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS, ZH = ROOT / "web" / "docs", ROOT / "locales" / "zh" / "nodeDefs.json"
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def node_ids():
    """Ids in the schemas, read without ComfyUI."""
    found = []
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema":
                found += [word.value.value for word in call.keywords if word.arg == "node_id"]
    return found


NODES = node_ids()


def test_the_nodes_are_found():
    assert {"SSRLoRA", "SSRMerge", "SSRSolve"} <= set(NODES) and len(NODES) == len(set(NODES))


@pytest.mark.parametrize("node", NODES)
def test_a_help_page_in_both_languages(node):
    for path in (DOCS / f"{node}.md", DOCS / node / "zh.md"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# "), path
        assert bool(CHINESE.search(text)) == (path.name == "zh.md"), path
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
            assert (DOCS / picture).is_file(), (path, picture)
        assert f"images/{node}.jpg" in text, f"{path} has no picture"


@pytest.mark.parametrize("node", NODES)
def test_texts_in_chinese(node):
    texts = json.loads(ZH.read_text(encoding="utf-8"))[node]
    assert CHINESE.search(texts["description"])
    for name, entry in {**texts["inputs"], **{f"output {i}": one for i, one in texts["outputs"].items()}}.items():
        assert entry["name"], name
        assert CHINESE.search(entry["tooltip"]), name


def test_no_texts_of_nodes_that_are_gone():
    assert set(json.loads(ZH.read_text(encoding="utf-8"))) == set(NODES)
    pages = {path.stem for path in DOCS.glob("*.md")} | {path.parent.name for path in DOCS.glob("*/zh.md")}
    assert pages == set(NODES)
