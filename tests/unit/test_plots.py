"""What the pictures show is what the numbers say, and it can be read."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy
import pytest
from PIL import Image

from ssr_core import Target
from ssr_core.compare import Comparison, Row
from ssr_core.layer_report import LayerReport
from ssr_core.plots import DARK, LIGHT, THEMES, draw_comparison, draw_crosstalk, draw_errors, draw_map, report_pages
from ssr_core.plots.canvas import Canvas, short_name
from ssr_core.plots.maps import _common_start, _titles
from ssr_core.plots.pages import side_by_side
from ssr_core.plots.theme import contrast, heat, ink_on, luminance
from ssr_core.report import MergeReport

ERRORS = {"result": 0.3, "sum": 1.2, "average": 0.7, "gains": 0.6}


def layer(path, result, *, status="routed", count=2, scale=1.0):
    x = [[1.0 if i == j else 0.5 for j in range(count)] for i in range(count)]
    y = [[1.0 if i == j else 0.0 for j in range(count)] for i in range(count)]
    errors = {**ERRORS, "result": result}
    by_task = {name: [value] * count for name, value in errors.items()}
    known = status == "routed"
    return LayerReport(
        Target(path),
        status,
        tuple(range(count)) if status != "passed_through" else (0,),
        8,
        errors=errors if known else {},
        task_errors=by_task if known else {},
        held_errors={n: v * scale for n, v in errors.items()} if known else {},
        held_task_errors={n: [a * scale for a in v] for n, v in by_task.items()} if known else {},
        crosstalk={"sum": x, "result": y} if known else {},
    )


def report(*layers, count=2):
    return MergeReport("m", tuple(f"folder/lora_{i}.safetensors" for i in range(count)), layers, ())


def pixels(picture):
    return numpy.asarray(picture.convert("RGB"))


def area(picture, colour):
    """How many pixels have exactly this colour."""
    return int((pixels(picture) == numpy.array(colour)).all(axis=2).sum())


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_text_and_bars_stand_out_from_the_paper(theme):
    assert contrast(theme.ink, theme.paper) > 7 and contrast(theme.faint, theme.paper) > 4.5
    assert all(contrast(colour, theme.paper) > 2.1 for colour in theme.routers.values())
    assert contrast(theme.routers["result"], theme.paper) > 3


def test_cividis_gets_lighter_all_the_way_and_numbers_on_it_can_be_read():
    values = [luminance(heat(step / 200)) for step in range(201)]
    assert all(b >= a - 1e-4 for a, b in pairwise(values))
    assert heat(-1) == heat(0) and heat(2) == heat(1) and heat(0)[2] > heat(0)[0] and heat(1)[0] > 200
    assert all(contrast(ink_on(heat(step / 50)), heat(step / 50)) > 4.3 for step in range(51))


def test_contrast_by_hand():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert luminance((255, 0, 0)) == pytest.approx(0.2126) and luminance((188, 188, 188)) == pytest.approx(
        0.503, abs=2e-3
    )


@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("theme", THEMES)
def test_heatmaps_have_their_values_colours(theme, count):
    picture = draw_crosstalk(report(layer("b.0.q", 0.3, count=count), count=count), THEMES[theme])
    cell = area(picture, heat(0.5)) / (count * (count - 1))  # before: off the diagonal
    assert area(picture, heat(0.0)) == pytest.approx(
        count * (count - 1) * cell, rel=0.35
    )  # after, whose numbers are shorter
    assert area(picture, heat(1.0)) == pytest.approx(2 * count * cell, rel=0.4)  # both diagonals
    assert cell > 400


def test_bars_are_as_long_as_the_errors_on_held_out_tokens():
    one = report(layer("b.0.q", 0.3), layer("b.1.q", 0.3))
    picture = draw_errors(one, LIGHT)
    sizes = {name: area(picture, LIGHT.routers[name]) for name in ERRORS}
    assert sizes["sum"] / sizes["average"] == pytest.approx(1.2 / 0.7, rel=0.1)
    assert sizes["result"] / sizes["average"] == pytest.approx(0.3 / 0.7, rel=0.15)
    longer = draw_errors(report(layer("b.0.q", 0.3, scale=2.0)), LIGHT)  # axis and bars grow alike, the notches show
    assert area(longer, LIGHT.routers["sum"]) < sizes["sum"]


def test_map_colours_cells_by_error_and_marks_what_was_not_measured():
    layers = [layer("b.0.q", 0.0), layer("b.1.q", 1.5), layer("b.2.q", 0, status="passed_through"), layer("in", 0.75)]
    after, before = (draw_map(report(*layers), LIGHT, name) for name in ("error", "interference"))
    legend = area(draw_map(report(layer("b.0.k", 0.9, status="passed_through")), LIGHT), LIGHT.grid)
    assert area(after, heat(0.0)) > 1000 and area(after, heat(1.0)) > 1000 and area(after, heat(0.5)) > 1000
    assert area(before, heat(0.8)) > 3000 and area(before, heat(0.0)) < 1000
    assert area(after, LIGHT.grid) == pytest.approx(legend, rel=0.2)
    anchored = draw_map(report(layer("b.0.q", 0.5, status="anchored"), layer("b.1.q", 0.5)), LIGHT)
    plain = draw_map(report(layer("b.0.q", 0.5, status="passed_through"), layer("b.1.q", 0.5)), LIGHT)
    assert area(anchored, LIGHT.ink) > area(plain, LIGHT.ink) + 50


@pytest.mark.parametrize("theme", THEMES)
def test_pages_have_one_size_and_reports_without_numbers_one_page(theme):
    pages = report_pages(report(layer("b.0.q", 0.3), layer("b.0.k", 0.2)), THEMES[theme])
    assert len(pages) == 4 and len({page.size for page in pages}) == 1
    whole = side_by_side(pages)
    assert whole.size == (2 * pages[0].width, 2 * pages[0].height)
    assert (pixels(whole)[: pages[0].height, pages[0].width :] == pixels(pages[1])).all()
    (empty,) = report_pages(report(layer("b.0.q", 0.3, status="passed_through")), THEMES[theme])
    assert empty.size == pages[0].size and len(numpy.unique(pixels(empty).reshape(-1, 3), axis=0)) > 10


def test_the_best_of_a_comparison_is_marked_though_another_is_chosen():
    rows = [Row("a", "a", 0.2, 0.8), Row("b", "b", 0.4, 0.4)]
    none = [Row("a", "a", 0.2, 0.8), Row("b", "b", 0.4, 0.8)]  # the first of equals
    first, second = (pixels(draw_comparison(Comparison(("x", "y"), tuple(r)), LIGHT, 0)) for r in (none, rows))
    half = 132 + 64
    assert (first[132:half] != second[132:half]).any() and (first[half : half + 64] != second[half : half + 64]).any()


def test_comparison_bars_are_as_long_as_the_scores():
    rows = (Row("a", "a", 0.2, 0.8), Row("b", "b", 0.4, 0.4), Row("c", refused="No."), Row("d", "d"))
    picture = draw_comparison(Comparison(("x", "y"), rows), LIGHT, 1)
    chosen = area(picture, LIGHT.routers["result"])
    other = area(picture, LIGHT.faint)  # the axis' numbers and the frame are of this colour too
    assert other / chosen == pytest.approx(2.0, rel=0.25)


def test_bars_that_are_cut_show_a_break():
    """At the axis' end a bar of 3 and one of 9 are of one length; only the longer one is broken."""
    whole, cut = (report(layer("b.0.q", 2.0, scale=1.5 * factor)) for factor in (1, 3))
    colour = LIGHT.routers["result"]
    breaks = [break_in(draw_errors(one, LIGHT), colour, axis=1) for one in (whole, cut)]
    assert breaks == [1, 3]  # one is the notch at calibration's own error
    for score, expected in ((1.3, 0), (4.0, 2)):
        picture = draw_comparison(Comparison(("x", "y"), (Row("a", "a", 9.0, score),)), LIGHT, 0)
        assert break_in(picture, colour, axis=0) == expected


def break_in(picture, colour, axis):
    """Gaps along the middle of the first bar of this colour (axis 1: it stands, 0: it lies), below any legend."""
    hit = (numpy.abs(pixels(picture).astype(int) - numpy.array(colour)).max(axis=2) < 12)[125:]
    lines = hit.T if axis else hit
    longest = max(range(len(lines)), key=lambda at: lines[at].sum())
    found = numpy.flatnonzero(lines[longest])
    return int((numpy.diff(found) > 1).sum())


def test_columns_of_the_map_leave_out_what_all_begin_with():
    paths = ("double_blocks.0.q", "double_blocks.1.q", "single_blocks.0.q")
    plain, long, other = (
        draw_map(report(*(layer(f"{start}{path}", 0.3) for path in paths)), LIGHT)
        for start in ("", "diffusion_model.", "diffusion_model.inner.")
    )
    assert plain.tobytes() == long.tobytes() == other.tobytes()
    assert _common_start(["diffusion_model.blocks.3"]) == "diffusion_model." and _common_start(["blocks.3"]) == ""
    assert _common_start(["a.b.0", "ab.c.0"]) == "" and _common_start([]) == ""


def test_a_forecast_is_titled_as_one():
    merged = report(layer("b.0.q", 0.3))
    titles = {_titles(replace(merged, forecast=forecast), "error") for forecast in (False, True)}
    assert len(titles) == 2 and all("calibration's own tokens" in below for _, below in titles)
    forecast = replace(merged, forecast=True)
    assert "this merge" not in " ".join(_titles(forecast, "error")) + forecast.to_markdown().replace(
        "method of this merge", ""
    )
    for draw in (draw_crosstalk, draw_errors, draw_map):
        assert draw(forecast, LIGHT).tobytes() != draw(merged, LIGHT).tobytes()


def test_names_fit_and_what_no_font_has_becomes_a_question_mark():
    canvas = Canvas(LIGHT)
    long = "a_very_long_name_of_a_lora_that_goes_on_and_on_v12"
    short = canvas.fitted(long, 20, 160)
    assert canvas.width_of(short, 20) <= 160 and short.startswith("a_v") and short.endswith("12") and "…" in short
    assert canvas.fitted("dog", 20, 160) == "dog"
    assert canvas.size_for(long, 20, 160) < 20 and canvas.size_for("dog", 20, 160) == 20
    one, other = Canvas(LIGHT), Canvas(LIGHT)
    one.text(50, 50, "é漫", 30)
    other.text(50, 50, "é?", 30)
    assert (pixels(one.picture()) == pixels(other.picture())).all()
    assert short_name("a/b\\dog.safetensors") == "dog"


def test_pictures_are_the_same_each_time():
    one, other = (draw_errors(report(layer("b.0.q", 0.3)), DARK) for _ in range(2))
    assert isinstance(one, Image.Image) and one.tobytes() == other.tobytes()
    assert math.isclose(one.width / one.height, 4 / 3)
