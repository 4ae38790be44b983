"""SSR Merge in the real frontend on tiny models, in both renderers: what a person sees is what the server computed."""

import pytest
from worlds import NAMES, PROMPTS

WATCH = """() => { window.said = []; const at = document.querySelector('.ssr-panel .ssr-status');
  new MutationObserver(() => said.push(at.textContent)).observe(at, {childList: true, characterData: true, subtree: true}); }"""


UNDO = """async () => { const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
  const keep = () => (tracker.captureCanvasState ?? tracker.checkState).call(tracker);
  keep(); app.graph.nodes.find((n) => n.type === 'SSRMerge').title = 'other'; keep(); await tracker.undo(); }"""


def numbers(panel):
    """The two matrices and the errors, as shown."""
    grids = {}
    for title in ("Plain sum", "This merge"):
        cells = panel.get_by_role("grid", name=title).get_by_role("gridcell").all_inner_texts()
        grids[title] = [float(cell) for cell in cells]
    rows = panel.locator("tr[data-router]").evaluate_all(
        "(all) => all.map((r) => [r.dataset.router, ...[...r.cells].slice(1).map((c) => c.textContent)])"
    )
    return grids, {row[0]: [None if text == "\u2013" else float(text) for text in row[1:]] for row in rows}


def assert_shows(panel, report):
    grids, errors = numbers(panel)
    for title, name in (("Plain sum", "sum"), ("This merge", "result")):
        flat = [value for row in report["crosstalk"][name] for value in row]
        assert grids[title] == pytest.approx(flat, abs=0.0051), title
    for router, value in report["reconstruction_error_on_calibration"].items():
        assert errors[router][0] == pytest.approx(value, rel=1e-3, abs=6e-4), router


def test_the_node_is_found_by_what_a_person_types(desk, shots):
    desk.page.evaluate("() => app.graph.clear()")
    desk.page.mouse.dblclick(900, 600)
    desk.page.wait_for_timeout(800)
    desk.page.keyboard.type("merge lora")
    desk.page.get_by_text("SSR Merge", exact=True).first.wait_for()
    desk.shot(shots, "search")
    desk.page.get_by_text("SSR Merge", exact=True).first.click()
    desk.page.wait_for_timeout(600)
    desk.page.mouse.click(900, 600)  # the newer search lets the node hang at the pointer
    desk.page.wait_for_timeout(600)
    types = desk.page.evaluate("() => app.graph.nodes.map((n) => n.type)")
    assert types == ["SSRMerge"]
    assert desk.panel().is_visible()


def test_three_loras_are_added_in_the_panel(desk, shots):
    ids = desk.build((), ())
    panel = desk.panel()
    panel.get_by_role("tab", name="LoRAs").click()
    for name in NAMES:
        panel.get_by_role("button", name="+ Add LoRA").click()
        desk.page.keyboard.type(name)
        panel.locator(".ssr-list [aria-selected=true]").filter(has_text=name).wait_for()
        desk.page.keyboard.press("Enter")
        desk.page.wait_for_timeout(400)
    assert desk.page.evaluate("() => document.activeElement.textContent") == "+ Add LoRA"
    boxes = desk.page.evaluate("() => app.graph.nodes.map((n) => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30])")
    covered = [
        (a, b)
        for i, a in enumerate(boxes)
        for b in boxes[:i]
        if a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
    ]
    assert covered == [], "new nodes cover none of the graph's"
    desk.shot(shots, "loras")
    prompt = desk.page.evaluate("async () => (await app.graphToPrompt()).output")
    inputs = prompt[str(ids["work"])]["inputs"]
    loras = [prompt[inputs[f"loras.lora{i}"][0]]["inputs"]["lora"] for i in range(3)]
    assert loras == [f"{name}.safetensors" for name in NAMES]
    panel.get_by_role("button", name="cat: move up").click()
    focused = "() => document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"
    assert desk.page.evaluate(focused) == "cat: enabled", "the first cannot move up again, the focus stays with it"
    panel.get_by_role("checkbox", name="tower: enabled").uncheck()
    panel.get_by_role("spinbutton", name="dog: strength").fill("0.5")
    desk.page.keyboard.press("Tab")
    desk.page.wait_for_timeout(400)
    prompt = desk.page.evaluate("async () => (await app.graphToPrompt()).output")
    inputs = prompt[str(ids["work"])]["inputs"]
    loras = [prompt[inputs[f"loras.lora{i}"][0]]["inputs"] for i in range(3)]
    assert [one["lora"].split(".")[0] for one in loras] == ["cat", "dog", "tower"]
    assert [one["enabled"] for one in loras] == [True, True, False]
    assert [one["strength_model"] for one in loras] == [1, 0.5, 1]
    panel.get_by_role("button", name="dog: remove").click()
    desk.page.wait_for_timeout(500)
    assert panel.locator("[data-lora]").evaluate_all("(all) => all.map((r) => r.dataset.lora)") == [
        "cat.safetensors",
        "tower.safetensors",
    ]


def test_a_run_shows_progress_and_then_the_servers_numbers(desk, shots):
    ids = desk.build(NAMES, PROMPTS, steps=4)
    desk.set_widget(ids["work"], "seed", {"classic": 11, "vue": 12}[desk.renderer])  # else the server has it already
    panel = desk.panel()
    box = panel.bounding_box()
    desk.page.evaluate(WATCH)
    desk.queue()
    desk.page.wait_for_function("() => document.querySelectorAll('.ssr-task img').length >= 2", timeout=60_000)
    assert panel.bounding_box() == box
    desk.shot(shots, "running")
    seen = desk.finish()
    assert sum(kind == "b_preview_with_metadata" for kind, _ in seen) >= 6, "the frontend's own previews still come"
    said = desk.page.evaluate("() => said")
    for i, name in enumerate(NAMES):
        for step in (1, 4):
            assert f"{name} ({i + 1} of 3), prompt 1 of 1, step {step} of 4" in said
    assert said[-1] == "Finished."
    assert panel.bounding_box() == box
    report = desk.history()[str(ids["last"])]["ssr_merge"][0]
    assert report["tasks"] == [f"{name}.safetensors" for name in NAMES]
    assert_shows(panel, report)
    desk.shot(shots, "result")
    panel.screenshot(path=shots / f"panel_{desk.renderer}.png")


def test_a_layers_numbers_are_the_reports(desk, shots):
    ids = desk.build(NAMES[:2], PROMPTS[:2])
    desk.run()
    panel = desk.panel()
    panel.get_by_role("tab", name="Layers").click()
    report = desk.history()[str(ids["last"])]["ssr_merge"][0]
    layers = [dict(zip(report["layers"]["columns"], row, strict=True)) for row in report["layers"]["rows"]]
    chosen = layers[len(layers) // 2]
    panel.get_by_role("searchbox").fill(chosen["target"])
    panel.locator(".ssr-list [role=option]").filter(has_text=chosen["target"]).first.click()
    for field in ("rank", "condition"):
        assert float(panel.locator(f"dd[data-field={field}]").inner_text()) == pytest.approx(chosen[field], rel=0.01)
    tokens = [float(text) for text in panel.locator("dd[data-field=tokens]").inner_text().split(",")]
    assert tokens == pytest.approx(chosen["tokens"], rel=0.01)
    desk.shot(shots, "layers")
    panel.get_by_role("tab", name="What next").click()
    assert "Files" in panel.inner_text()


def test_a_merge_from_records_has_the_panel_and_shows_its_passes_once(desk, shots):
    ids = desk.build(NAMES[:2], PROMPTS[:2], kind="SSRMergeFromRecords")
    desk.set_widget(ids["work"], "seed", {"classic": 21, "vue": 22}[desk.renderer])
    panel = desk.panel()
    desk.page.evaluate(WATCH)
    desk.run()
    assert any("cat (" in text and "step" in text for text in desk.page.evaluate("() => said"))
    assert_shows(panel, desk.history()[str(ids["last"])]["ssr_merge"][0])
    before = numbers(panel)
    desk.shot(shots, "records")
    desk.page.evaluate("() => { said.length = 0; }")
    desk.set_widget(ids["work"], "ridge", 0.5)
    desk.run()
    assert not any("step" in text for text in desk.page.evaluate("() => said")), "both have records now"
    assert numbers(panel) != before
    assert_shows(panel, desk.history()[str(ids["last"])]["ssr_merge"][0])


def test_a_changed_strength_runs_only_the_solve(desk):
    ids = desk.build(NAMES[:2], PROMPTS[:2], split=True)
    desk.run()
    calibrated, solved = desk.panel(0), desk.panel(1)
    calibrated.get_by_text("layers are shared by two or more LoRAs").wait_for()
    before = numbers(solved)
    desk.set_widget(ids["last"], "strengths", "1.0\n0.4")
    seen = desk.run()
    executed = {str(detail) for kind, detail in seen if kind == "executing" and detail}
    assert executed == {str(ids["last"]), str(ids["report"])}
    assert numbers(solved) != before
    assert_shows(solved, desk.history()[str(ids["last"])]["ssr_merge"][0])
    assert "layers are shared" in calibrated.inner_text(), "what did not run again keeps its result"


def test_cancel_says_so_and_the_next_run_works(desk, shots):
    ids = desk.build(NAMES[:2], PROMPTS[:2], steps=100)
    desk.queue()
    desk.page.wait_for_function(
        "() => document.querySelector('.ssr-status').textContent.includes('step')", timeout=60_000
    )
    desk.page.evaluate("() => app.api.interrupt()")
    desk.finish("execution_interrupted")
    assert desk.panel().get_by_role("status").inner_text() == "Stopped."
    desk.set_widget(ids["work"], "steps", 1)
    desk.run()
    assert_shows(desk.panel(), desk.history()[str(ids["last"])]["ssr_merge"][0])


def test_an_error_is_said(desk):
    desk.build(("dog",), ("",), steps=1)
    lora = desk.page.evaluate("() => app.graph.nodes.find((n) => n.type === 'SSRLoRA').id")
    desk.set_widget(lora, "enabled", False)
    desk.queue()
    desk.finish("execution_error")
    desk.page.keyboard.press("Escape")
    assert desk.panel().is_visible()
    desk.page.reload()
    desk.ready()


def test_everything_is_there_after_a_reload(desk, shots):
    ids = desk.build(NAMES, PROMPTS)
    desk.set_widget(ids["work"], "ridge", 0.02)
    desk.run()
    before = numbers(desk.panel())
    assert_shows(desk.panel(), desk.history()[str(ids["last"])]["ssr_merge"][0])
    saved = desk.page.evaluate(
        "() => JSON.stringify(app.graph.serialize().nodes.map((n) => [n.id, n.type, n.widgets_values]))"
    )
    assert "ssr_merge" not in desk.page.evaluate("() => JSON.stringify(app.graph.serialize())"), (
        "the workflow stays small"
    )
    desk.page.wait_for_timeout(1500)
    desk.page.reload()
    desk.ready()
    desk.page.wait_for_timeout(1500)
    now = desk.page.evaluate(
        "() => JSON.stringify(app.graph.serialize().nodes.map((n) => [n.id, n.type, n.widgets_values]))"
    )
    assert now == saved
    assert numbers(desk.panel()) == before
    assert desk.panel().get_by_role("status").inner_text() == "From the last run."
    desk.shot(shots, "reloaded")


def test_panels_survive_undo(desk):
    """The Vue renderer keeps old elements for new nodes of the same ids."""
    desk.build(NAMES[:2], PROMPTS[:2])
    desk.page.evaluate(UNDO)
    desk.page.wait_for_timeout(1500)
    assert desk.page.evaluate("() => app.graph.nodes.find((n) => n.type === 'SSRMerge').title") == "SSR Merge"
    elements = "() => app.graph.nodes.flatMap((n) => n.widgets.filter((w) => w.type === 'ssr_merge').map((w) => w.element.isConnected))"
    assert desk.page.evaluate(elements) == [True, True, True]
    desk.run()
    desk.panel().get_by_role("grid", name="This merge").wait_for()


def test_the_console_is_quiet(desk):
    assert [text for text in desk.page.messages if "execution" not in text.lower()] == []
