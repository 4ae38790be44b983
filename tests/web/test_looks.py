"""The panel in the real frontend, in both renderers: zoom, themes, room, and no effect on other nodes."""

import pytest
from worlds import NAMES, PROMPTS


def test_trigger_words_become_a_prompt(desk, shots):
    desk.build(("dog",), ("a photo of",))
    words = desk.page.locator(".ssr-triggers")
    words.get_by_role("button", name="outdoors").wait_for()
    assert words.get_by_role("button").all_inner_texts() == ["sks dog", "outdoors", "<b>bold</b>"]
    words.get_by_role("button", name="sks dog").click()
    lora = "() => app.graph.nodes.find((n) => n.type === 'SSRLoRA')"
    assert (
        desk.page.evaluate(f"() => ({lora})().widgets.find((w) => w.name === 'prompts').value") == "a photo of, sks dog"
    )
    desk.shot(shots, "triggers")
    desk.set_widget(desk.page.evaluate(f"() => ({lora})().id"), "lora", "cat.safetensors")
    words.get_by_text("names no trigger words").wait_for()


def test_zoomed_and_in_the_light_theme(desk, shots):
    desk.build(NAMES, PROMPTS)
    desk.run()
    desk.page.evaluate("() => app.extensionManager.setting.set('Comfy.ColorPalette', 'light')")
    for scale in (0.6, 1.6):
        desk.look(scale, -300 if scale > 1 else 120, -240 if scale > 1 else 90)
        panel = desk.panel()
        for name in ("Layers", "Result"):
            panel.get_by_role("tab", name=name).click()
            assert panel.get_by_role("tab", name=name).get_attribute("aria-selected") == "true"
        desk.shot(shots, f"light_{scale}")
    desk.page.evaluate("() => app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")


def test_nodes_have_room_for_what_they_show(desk):
    """Fresh ones, and those of a workflow that was saved before there was a panel."""
    if desk.renderer == "vue":
        pytest.skip("the Vue renderer measures nodes by itself")
    needs = "() => app.graph.nodes.filter((n) => n.type.startsWith('SSR')).map((n) => n.size[1] >= n.computeSize()[1])"
    desk.page.evaluate(
        """() => { app.graph.clear(); for (const [i, t] of ['SSRMerge', 'SSRLoRA'].entries()) {
             const n = LiteGraph.createNode(t); n.pos = [i * 600, 0]; app.graph.add(n); } }"""
    )
    assert desk.page.evaluate(needs) == [True, True]
    desk.page.evaluate(
        "async () => { const g = app.graph.serialize(); for (const n of g.nodes) n.size[1] = 100; await app.loadGraphData(g); }"
    )
    desk.page.wait_for_timeout(800)
    assert desk.page.evaluate(needs) == [True, True]


def test_other_nodes_are_left_alone(desk):
    desk.page.evaluate("() => app.graph.clear()")
    names = desk.page.evaluate(
        """() => { const n = LiteGraph.createNode('KSampler'); app.graph.add(n);
                   return [...n.widgets.map((w) => w.name), Object.hasOwn(n, 'onRemoved')]; }"""
    )
    assert not [name for name in names if "ssr" in str(name)]
    assert desk.page.locator(".ssr-panel").count() == 0


def test_the_console_is_quiet(desk):
    assert [text for text in desk.page.messages if "execution" not in text.lower()] == []
