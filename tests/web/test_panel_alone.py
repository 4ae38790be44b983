"""The panel in a bare page: no ComfyUI, made-up reports; every name in them tries to be markup."""

import json

import pytest

from .conftest import NASTY

TASKS = [f"styles/{NASTY}.safetensors", "cat.safetensors", "tower.safetensors"]
SUM = [[0.9, 1, 0.8], [0.7, 0.6, 1], [1, 0.3, 0.95]]
RESULT = [[1, 0.125, 0], [0.5, 1, 0.25], [0.05, 0.51, 1]]


def layer(index, error):
    matrix = {"sum": SUM, "result": RESULT}
    return [f"blocks.{index}.{NASTY}", "routed", [0, 1, 2], 12, [77.0, 8.0, 9.0], {"result": error, "sum": 1.5}, matrix]


REPORT = {
    "version": 1,
    "kind": "merge",
    "tasks": TASKS,
    "reconstruction_error_on_calibration": {"result": 0.609, "sum": 1.573, "average": 0.846, "gains": None},
    "crosstalk": {"sum": SUM, "result": RESULT},
    "layers": {
        "columns": ["target", "status", "tasks", "rank", "tokens", "errors", "crosstalk"],
        "rows": [layer(i, ((i * 37) % 100) / 100) for i in range(300)],
        "total": 300,
    },
    "files": [{"name": TASKS[0], "keys": 3, "fates": {"routed": 3}, "details": [], "details_total": 0}],
    "warnings": [f"{NASTY} is too strong."],
    "notes": [],
    "omitted": {},
}
OPEN = """async ({report, locale}) => {
  const [{createPanel}, {wordsFor}, {addStyles}] = await Promise.all(
    ['panel', 'text', 'dom'].map((name) => import(`/web/ssr/${name}.js`)));
  addStyles();
  await new Promise((done) => { document.getElementById('ssr-merge-styles').onload = done; setTimeout(done, 2000); });
  window.panel = createPanel({words: wordsFor(locale), lorasView: () => document.createTextNode('loras')});
  document.getElementById('place').append(window.panel.element);
  if (report) window.panel.show(report);
}"""


def show(page, report=REPORT, locale="en"):
    page.evaluate(OPEN, {"report": report, "locale": locale})
    return page.locator(".ssr-panel")


def test_numbers_are_those_of_the_report(page):
    panel = show(page)
    for title, matrix in (("Plain sum", SUM), ("This merge", RESULT)):
        cells = panel.get_by_role("grid", name=title).get_by_role("gridcell")
        shown = [float(text) for text in cells.all_inner_texts()]
        assert shown == pytest.approx([value for row in matrix for value in row], abs=0.0051)
    rows = {
        row.get_attribute("data-router"): row.locator("td").inner_text() for row in panel.locator("tbody tr").all()[-4:]
    }
    assert rows == {"result": "0.609", "sum": "1.573", "average": "0.846", "gains": "\u2013"}


def test_cells_are_read_out_by_pointer_and_by_arrow_keys(page):
    panel = show(page)
    grid = panel.get_by_role("grid", name="This merge")
    line = panel.locator(".ssr-read")
    grid.get_by_role("gridcell").nth(3).hover()
    assert "cat" in line.inner_text() and line.inner_text().endswith("0.500")
    first = grid.get_by_role("gridcell").first
    first.focus()
    page.keyboard.press("ArrowRight")
    assert line.inner_text().endswith("0.125")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    assert line.inner_text().startswith("tower under the prompt of cat") and line.inner_text().endswith("0.250")
    focusable = grid.evaluate("(grid) => [...grid.querySelectorAll('td')].filter((cell) => cell.tabIndex === 0).length")
    assert focusable == 1, "one stop for the tab key"


def test_everything_is_reached_by_keyboard(page):
    panel = show(page)
    panel.get_by_role("tab", name="Result").focus()
    page.keyboard.press("ArrowRight")
    assert panel.get_by_role("tab", selected=True).inner_text() == "Layers"
    page.keyboard.press("Tab")
    page.keyboard.type("blocks.7.")
    assert panel.locator(".ssr-list [role=option]").count() == 1
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")  # the select: largest error first
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    errors = sorted((row[5]["result"] for row in REPORT["layers"]["rows"]), reverse=True)
    chosen = panel.locator(".ssr-list [aria-selected=true]")
    assert float(chosen.locator("span").last.inner_text()) == pytest.approx(errors[2], abs=5e-4)
    assert panel.locator("dd[data-field=tokens]").inner_text() == "77, 8, 9"


def test_a_layers_numbers_keep_room_beside_long_names(page):
    report = json.loads(json.dumps(REPORT))
    report["layers"]["columns"].append("measures")
    for row in report["layers"]["rows"]:
        row.append({"share of the energy of others' inputs that the correction had to leave out": 0.25})
    page.evaluate("() => { document.getElementById('place').style.width = '380px'; }")
    panel = show(page, report)
    panel.get_by_role("tab", name="Layers").click()
    values = panel.locator(".ssr-detail dd")
    assert min(values.evaluate_all("(all) => all.map((one) => one.clientWidth)")) > 120
    tall = values.evaluate_all("(all) => all.map((one) => one.clientHeight)")
    assert tall[0] == min(tall), "the status is on one line"


def test_what_a_report_lacks_is_said(page):
    bare = {**REPORT, "crosstalk": {"sum": [[0] * 3] * 3, "result": [[0] * 3] * 3}}
    panel = show(page, bare)
    assert "No crosstalk to show" in panel.inner_text() and "0.609" in panel.inner_text()
    page.evaluate("(r) => panel.show(r)", {**bare, "reconstruction_error_on_calibration": {"result": None}})
    assert "Nothing was measured" in panel.inner_text()
    calibration = {"kind": "calibration", "tasks": [], "shared_layers": 3, "warnings": []}
    page.evaluate("(r) => panel.show(r)", calibration)
    panel.get_by_role("tab", name="Layers").click()
    assert "connect CALIBRATION to SSR Solve" in panel.inner_text()
    panel.get_by_role("tab", name="What next").click()
    assert "SSR Compare" in panel.inner_text() and "use the merge" not in panel.inner_text()


def test_long_lists_are_cut_and_say_so(page):
    panel = show(page, {**REPORT, "omitted": {"layers": 12}})
    panel.get_by_role("tab", name="Layers").click()
    assert panel.locator(".ssr-list [role=option]").count() == 200
    text = panel.locator(".ssr-list").inner_text()
    assert "100 more" in text and "12 layers" in text


def test_nothing_moves(page):
    """The panel keeps its place and size whatever it shows."""
    panel = show(page, None)
    box = panel.bounding_box()
    progress = {"prompt_id": "p", "stage": "calibrate", "tasks": TASKS, "prompts": 1, "prompt": 0, "steps": 4}
    picture = "() => panel.preview(new Blob([new Uint8Array(1)], {type: 'image/png'}))"
    steps = [("(m) => panel.progress(m)", {**progress, "task": i, "step": 1, "share": i / 3}) for i in range(3)]
    for code, value in [*steps, (picture, None), ("(r) => panel.show(r)", REPORT)]:
        page.evaluate(code, value)
        assert panel.bounding_box() == box
    for name in ("LoRAs", "Layers", "What next", "Result"):
        panel.get_by_role("tab", name=name).click()
        assert panel.bounding_box() == box


def test_progress_by_lora_and_step(page):
    panel = show(page, None)
    message = {"prompt_id": "p", "stage": "calibrate", "tasks": TASKS, "task": 1, "prompts": 2, "prompt": 1, "steps": 4}
    page.evaluate("(m) => panel.progress(m)", {**message, "step": 3, "share": 0.5})
    assert panel.get_by_role("status").inner_text() == "cat (2 of 3), prompt 2 of 2, step 3 of 4"
    states = panel.locator(".ssr-task").evaluate_all("(all) => all.map((one) => one.dataset.state)")
    assert states == ["done", "running", "waiting"]
    page.evaluate("() => panel.end(false)")
    assert panel.get_by_role("status").inner_text() == "Stopped."


def test_pictures_are_given_back(page):
    show(page, None)
    page.evaluate(
        """() => { window.open_ = new Set(); const {createObjectURL: make, revokeObjectURL: drop} = URL;
             URL.createObjectURL = (b) => { const u = make(b); open_.add(u); return u; };
             URL.revokeObjectURL = (u) => { open_.delete(u); drop(u); }; }"""
    )
    for task in range(3):
        for step in range(5):
            page.evaluate(
                "(m) => panel.progress(m)",
                {"prompt_id": "p", "stage": "calibrate", "tasks": TASKS, "task": task, "step": step},
            )
            page.evaluate("() => panel.preview(new Blob(['x']))")
    assert page.evaluate("() => open_.size") == 3
    page.evaluate("(r) => panel.show(r)", REPORT)
    assert page.evaluate("() => open_.size") == 0


def luminance(colour):
    channels = [int(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["", "dark-theme"])
def test_numbers_are_legible_on_every_shade_in_both_themes(page, theme):
    page.evaluate("(name) => { document.body.className = name; }", theme)
    shades = [[(i * 9 + j) / 80 for j in range(9)] for i in range(9)]
    many = {**REPORT, "tasks": [f"l{i}" for i in range(9)], "crosstalk": {"sum": shades, "result": shades}}
    panel = show(page, many)
    colours = panel.locator("[role=gridcell]").evaluate_all(
        """(cells) => cells.map((cell) => { const style = getComputedStyle(cell);
             const canvas = new OffscreenCanvas(1, 1).getContext('2d');
             const rgb = (c) => { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); return 'rgb(' + [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).join(',') + ')'; };
             return [rgb(style.color), rgb(style.backgroundColor)]; })"""
    )
    assert len(set(map(tuple, colours))) > 30
    for pair in colours:
        light, dark = sorted(map(luminance, pair), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair


@pytest.mark.parametrize("width", [250, 380, 700])
def test_it_fits(page, width, shots):
    page.evaluate("(w) => { document.getElementById('place').style.width = w + 'px'; }", width)
    panel = show(page)
    for name in ("Layers", "What next", "Result"):
        panel.get_by_role("tab", name=name).click()
        assert panel.locator(".ssr-body").evaluate("(body) => body.scrollWidth <= body.clientWidth"), name
    panel.screenshot(path=shots / f"panel_{width}.png")


def test_keys_stay_inside_but_for_queueing(page):
    panel = show(page)
    page.evaluate("() => { window.keys = []; addEventListener('keydown', (e) => keys.push(e.key)); }")
    panel.get_by_role("tab", name="Result").focus()
    for key in ("Delete", "Control+z", "ArrowRight", "Control+Enter"):
        page.keyboard.press(key)
    assert page.evaluate("() => keys.filter((key) => key !== 'Control')") == ["Enter"]


def test_words_are_in_the_users_language(page):
    panel = show(page, locale="zh")
    assert panel.get_by_role("tab").all_inner_texts() == ["LoRA", "结果", "层", "下一步"]
