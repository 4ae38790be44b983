"""Rounds of calibration from the command: one process, two, and made again from the file."""

from __future__ import annotations

import json

import pytest

from .test_headless import EQUAL, TWO_PROCESSES, difference, files, recipe_of, run


@pytest.fixture
def written(base, tmp_path):
    """A recipe file with so many rounds."""

    def write(rounds):
        values = recipe_of(files(base))
        values["calibration"]["settings"]["rounds"] = rounds
        path = tmp_path / f"rounds_{rounds}.json"
        path.write_text(json.dumps(values))
        return path

    return write


def test_two_processes_run_the_same_rounds_as_one_and_a_file_is_made_again(checkout, base, written, tmp_path):
    once, alone, two, again = (tmp_path / f"{name}.safetensors" for name in ("once", "alone", "two", "again"))
    for recipe, output, more in (
        (written(1), once, {}),
        (written(2), alone, {}),
        (written(2), two, {"launcher": TWO_PROCESSES}),
    ):
        code, _, err = run(checkout, base, recipe, "--output", output, **more)
        assert code == 0, err
    assert difference(alone, two) < EQUAL < 1e-3 < difference(alone, once)
    code, _, err = run(checkout, base, alone, "--again", "--trust-graph", "--output", again)
    assert code == 0, err
    assert difference(alone, again) < EQUAL
