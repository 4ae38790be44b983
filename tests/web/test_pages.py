"""Every example workflow and every help page, opened the way a person opens them."""

import re

import pytest
from worlds import PACK

NODES = sorted(path.stem for path in (PACK / "web" / "docs").glob("*.md"))
WORKFLOWS = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))
ADD = "(type) => { app.graph.clear(); const n = LiteGraph.createNode(type); n.pos = [700, 250]; app.graph.add(n); app.canvas.ds.scale = 0.6; app.canvas.ds.offset = [0, 0]; app.canvas.selectNode(n); }"
COMMAND = "(id) => app.extensionManager.command.execute(id)"


def titles(node):
    """First lines of a node's pages."""
    pages = {"en": PACK / "web" / "docs" / f"{node}.md", "zh": PACK / "web" / "docs" / node / "zh.md"}
    return {locale: page.read_text(encoding="utf-8").splitlines() for locale, page in pages.items()}


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_every_help_page(desk, shots, locale):
    desk.page.evaluate("(l) => app.extensionManager.setting.set('Comfy.Locale', l)", locale)
    desk.page.wait_for_timeout(800)
    desk.page.reload()
    desk.ready()
    try:
        for node in NODES:
            desk.page.evaluate(ADD, node)
            desk.page.wait_for_timeout(300)
            desk.page.get_by_test_id("info-button").first.click()
            help_ = desk.page.locator(".node-help-content").first
            first = next(line for line in titles(node)[locale][2:] if line)
            help_.get_by_text(re.split(r"[*`]", first)[0][:12].strip(), exact=False).first.wait_for(timeout=60_000)
            loaded = help_.locator("img").first.evaluate("(i) => i.decode().then(() => i.naturalWidth)")
            assert loaded > 100, node
            if node == "SSRMerge":
                desk.shot(shots, f"help_{locale}")
    finally:
        desk.page.evaluate("() => app.extensionManager.setting.set('Comfy.Locale', 'en')")
        desk.page.wait_for_timeout(500)


def test_names_of_inputs_are_translated(desk, shots):
    desk.page.evaluate("() => app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    desk.page.wait_for_timeout(500)
    desk.page.reload()
    desk.ready()
    try:
        desk.page.evaluate(ADD, "SSRMerge")
        labels = desk.page.evaluate("() => app.graph.nodes[0].widgets.map((w) => w.label ?? w.name)")
        assert {"种子", "步数", "宽度", "岭参数"} <= set(labels)
        assert desk.panel().get_by_role("tab").all_inner_texts() == ["LoRA", "结果", "层", "下一步"]
        desk.shot(shots, "chinese")
    finally:
        desk.page.evaluate("() => app.extensionManager.setting.set('Comfy.Locale', 'en')")
        desk.page.wait_for_timeout(500)
        desk.page.reload()
        desk.ready()


def test_every_example_opens_from_the_template_browser(desk, shots):
    for i, name in enumerate(WORKFLOWS):
        desk.page.evaluate(COMMAND, "Comfy.BrowseTemplates")
        search = desk.page.get_by_placeholder("Search").last
        search.wait_for()
        search.fill(name)
        card = desk.page.get_by_test_id(f"template-workflow-{name}")
        card.wait_for(timeout=60_000)
        picture = card.locator("img").first
        assert picture.evaluate("(i) => i.decode().then(() => i.naturalWidth)") > 300, name
        if i == 0:
            search.fill("")
            desk.page.get_by_text("ssr-merge", exact=True).last.click()
            desk.page.wait_for_timeout(2500)
            desk.shot(shots, "templates")
            search.fill(name)
        card.click()
        desk.page.wait_for_function("() => app.graph.nodes.some((n) => n.type.startsWith('SSR'))", timeout=60_000)
        desk.page.wait_for_timeout(1200)
        desk.page.keyboard.press("Escape")
        missing = desk.page.evaluate(
            "() => app.graph.nodes.filter((n) => !LiteGraph.registered_node_types[n.type]).map((n) => n.type)"
        )
        assert missing == [], name
        desk.shot(shots, f"workflow_{name}")
        desk.page.evaluate("() => app.graph.clear()")
