"""What a person reads, as the server hands it out: tooltips, aliases, help pages, translations, templates."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request

import pytest
from safetensors.torch import save_file

OURS = "custom_nodes.ssr-merge"
HIDDEN = "hidden"


def fetch(server, path):
    with urllib.request.urlopen(server.url + path, timeout=30) as answer:
        return answer.read()


@pytest.fixture(scope="module")
def nodes(server):
    return {name: node for name, node in server.schemas().items() if node["python_module"] == OURS}


def inputs_of(node):
    return {name: spec for kind, specs in node["input"].items() if kind != HIDDEN for name, spec in specs.items()}


def test_every_input_and_output_has_a_tooltip_and_every_node_aliases(nodes):
    assert len(nodes) >= 10
    for name, node in nodes.items():
        assert node["description"] and node["search_aliases"], name
        for input_name, spec in inputs_of(node).items():
            assert len(spec) > 1 and spec[1].get("tooltip"), (name, input_name)
        assert len(node["output_tooltips"]) == len(node["output"]) and all(node["output_tooltips"]), name


def test_people_find_the_nodes_by_their_words(nodes):
    aliases = {alias: name for name, node in nodes.items() for alias in node["search_aliases"]}
    for words in ("merge lora", "combine characters", "np-lora"):
        assert words in aliases


def test_translations_name_every_input_and_output(server, nodes):
    texts = json.loads(fetch(server, "/i18n"))["zh"]["nodeDefs"]
    for name, node in nodes.items():
        assert set(texts[name]["inputs"]) == set(inputs_of(node)), name
        assert set(texts[name]["outputs"]) == {str(i) for i in range(len(node["output"]))}, name
        assert texts[name]["display_name"] == node["display_name"], "search by the name of the paper works everywhere"


@pytest.mark.parametrize("page", ["{}.md", "{}/zh.md"])
def test_help_pages_are_served_and_name_every_input(server, nodes, page):
    for name, node in nodes.items():
        text = fetch(server, f"/extensions/ssr-merge/docs/{page.format(name)}").decode()
        words = set(re.findall(r"[a-z][a-z0-9_]+", text))
        assert set(inputs_of(node)) <= words, (name, set(inputs_of(node)) - words)
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
            assert fetch(server, f"/extensions/ssr-merge/docs/{picture}")[:2] == b"\xff\xd8", picture


def numbers(text):
    return sorted(float(found) for found in re.findall(r"\d+(?:\.\d+)?", text))


def options_of(spec):
    return [str(option) for option in spec[1].get("options", spec[0] if isinstance(spec[0], list) else ())]


WORDS = {"on": True, "off": False, "\u5f00\u542f": True, "\u5173\u95ed": False}


def means(said, default):
    """Whether a word of a text is this value."""
    if isinstance(default, bool):
        return WORDS.get(said.lower()) is default
    if default == "":
        return said.startswith(("empty", "\u7a7a"))
    return said == default or (not isinstance(default, str) and numbers(said) == [default])


def test_recommended_values_are_the_defaults(nodes):
    found = 0
    for name, node in nodes.items():
        for input_name, spec in inputs_of(node).items():
            for value in re.findall(r"(\S+) \(?recommended", spec[1]["tooltip"]):
                default = spec[1].get("default", (options_of(spec) or [None])[0])
                assert means(value, default), (name, input_name, value)
                found += 1
    assert found > 20


def test_translations_say_the_same_numbers_and_options(server, nodes):
    texts = json.loads(fetch(server, "/i18n"))["zh"]["nodeDefs"]
    for name, node in nodes.items():
        translated, specs = texts[name], inputs_of(node)
        pairs = {one: (spec[1]["tooltip"], translated["inputs"][one]["tooltip"]) for one, spec in specs.items()}
        for index, tooltip in enumerate(node["output_tooltips"]):
            pairs[f"output {index}"] = tooltip, translated["outputs"][str(index)]["tooltip"]
        pairs["description"] = node["description"], translated["description"]
        for one, (english, chinese) in pairs.items():
            assert numbers(english) == numbers(chinese), (name, one)
            for option in options_of(specs[one]) if one in specs else ():
                assert (option in english) == (option in chinese), (name, one, option)


def table_rows(text):
    """(last heading, cells) of every row of every table."""
    rows, head = [], []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if head and cells and set(line) - set("|- "):
            rows.append((head[-1], cells))
        head = head or cells if cells else []
    return rows


def named(cell):
    """Inputs that a row is about: without remarks in brackets."""
    return re.findall(r"[A-Za-z]\w*", re.sub(r"[(\uff08].*?[)\uff09]", "", cell))


def test_tables_of_the_help_pages_agree_with_each_other_and_with_the_defaults(server, nodes):
    checked = 0
    for name, node in nodes.items():
        pages = [
            fetch(server, f"/extensions/ssr-merge/docs/{page}").decode() for page in (f"{name}.md", f"{name}/zh.md")
        ]
        english, chinese = (table_rows(page) for page in pages)
        assert [named(cells[0]) for _, cells in english] == [named(cells[0]) for _, cells in chinese], name
        for (head, one), (_, other) in zip(english, chinese, strict=True):
            assert numbers(" ".join(one)) == numbers(" ".join(other)), (name, one[0])
            if head != "leave at" or one[-1].startswith("as in"):
                continue
            for cell in (one[-1], other[-1]):
                for input_name, said in zip(named(one[0]), re.split(r", |\u3001", cell), strict=True):
                    default = inputs_of(node)[input_name][1]["default"]
                    assert means(said, default), (name, input_name, said)
                    checked += 1
    assert checked > 40


def test_every_template_has_a_thumbnail(server):
    names = json.loads(fetch(server, "/workflow_templates"))["ssr-merge"]
    assert len(names) >= 8
    for name in names:
        assert fetch(server, f"/api/workflow_templates/ssr-merge/{name}.jpg")[:2] == b"\xff\xd8"
        json.loads(fetch(server, f"/api/workflow_templates/ssr-merge/{name}.json"))


def ask(server, name):
    try:
        return 200, json.loads(fetch(server, "/ssr_merge/triggers?name=" + urllib.parse.quote(name, safe="")))
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_trigger_words_of_listed_files_only(server, base):
    import torch

    folder = base / "models" / "loras"
    save_file({"w": torch.zeros(1)}, folder / "words.safetensors", {"modelspec.trigger_phrase": "sks dog"})
    save_file({"w": torch.zeros(1)}, base / "models" / "outside.safetensors", {"modelspec.trigger_phrase": "secret"})
    (folder / "broken.safetensors").write_bytes(b"\xff" * 64)
    server.schemas(refresh=True)
    status, found = ask(server, "words.safetensors")
    assert (status, found["phrases"]) == (200, ["sks dog"])
    outside = str(base / "models" / "outside.safetensors")
    for name in (
        "../outside.safetensors",
        outside,
        "..\\outside.safetensors",
        "",
        ".",
        "none.safetensors",
        "words.safetensors/../words.safetensors",
    ):
        status, found = ask(server, name)
        assert status == 404 and "secret" not in json.dumps(found), name
    status, found = ask(server, "broken.safetensors")
    assert status == 404 and "broken.safetensors" in found["error"] and str(base) not in found["error"]
