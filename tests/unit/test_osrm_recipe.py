"""Recipes of OSRM: the options that the nodes have, their defaults, and errors that name what is wrong."""

import json

import pytest
import torch

from ssr_core import FileError, InitOptions, MomentOptions, OSRMRecipe, Recipe, RefitOptions, read_any

INIT = {"model": {"checkpoint": "a.safetensors"}, "osrm_init": {"prompts": ["a photo of a fox"]}}
REFIT = {
    "model": {"checkpoint": "a.safetensors"},
    "sources": [{"name": "a.safetensors", "prompts": ["a fox"]}, {"name": "b.safetensors", "strength_model": 0.5}],
    "osrm_refit": {},
}


def read(tmp_path, value):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(value))
    return read_any(path)


def test_what_is_absent_is_as_in_the_nodes(tmp_path):
    init, refit = read(tmp_path, INIT), read(tmp_path, REFIT)
    assert init == OSRMRecipe(INIT["model"], {}, MomentOptions(), ("a photo of a fox",), InitOptions())
    assert refit.refit == RefitOptions() and refit.moments == MomentOptions("tokens") and refit.init is None
    first, second = refit.sources
    assert first.prompts == ("a fox",) and first.strength_model == 1.0 and second.strength_clip == 0.5
    assert isinstance(read(tmp_path, {"sources": REFIT["sources"]}), Recipe)


def test_every_option_arrives(tmp_path):
    options = {"rank": 3, "alpha": 2.0, "layers": "all", "only": "attn", "text_encoder": True, "energy": 0.5}
    moments = {"features": "tokens", "exact_limit": 7, "sketch": 9}
    written = {"prompts": ["x", "y"], **options, "key_style": "kohya", "dtype": "float16", **moments}
    settings = {"seed": 5, "steps": 2}
    init = read(tmp_path, {"osrm_init": written, "calibration": {"settings": settings}})
    assert init.init == InitOptions(**options, style="kohya", dtype=torch.float16)
    assert init.moments == MomentOptions(**moments) and init.settings == settings and init.prompts == ("x", "y")
    options = {"mode": "project", "strength": 0.5, "energy": 0.7, "ridge": 0.2}
    value = {**REFIT, "osrm_refit": {**options, **moments}, "calibration": {"settings": settings}}
    refit = read(tmp_path, value)
    assert refit.refit == RefitOptions(**options, seed=5) and refit.moments == MomentOptions(**moments)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({**INIT, "osrm_init": {}}, "osrm_init.prompts is missing"),
        ({**INIT, "osrm_init": {"prompts": ["x"], "rnk": 4}}, "osrm_init.rnk is no known key (did you mean rank?)"),
        ({**INIT, "osrm_init": {"prompts": ["x"], "energy": 0}}, "osrm_init.energy is 0"),
        ({**INIT, "sources": []}, "sources is no known key"),
        ({**INIT, "osrm_refit": {}}, "write one recipe for each"),
        ({**REFIT, "sources": REFIT["sources"][:1]}, "sources has 1 entries, at least 2"),
        ({**REFIT, "osrm_refit": {"mode": "project", "strength": 2}}, "strength 2"),
        ({**REFIT, "method": "ssr"}, "method is no known key"),
        ({**REFIT, "calibration": {"settings": {"joint_prompts": ["x"]}}}, "settings.joint_prompts is no known key"),
        ({**REFIT, "calibration": {"settings": {"runs": []}}}, "settings.runs is no known key"),
        ({**INIT, "calibration": {"settings": {"records": {}}}}, "settings.records is no known key"),
        ({**INIT, "calibration": {"file": "a.calibration.safetensors"}}, "calibration.file is no known key"),
        ({**REFIT, "model": {"unet": "a", "checkpoint": "b"}}, "give checkpoint, or unet, or graph"),
    ],
)
def test_wrong_recipes_name_what_is_wrong(tmp_path, value, words):
    with pytest.raises(FileError) as caught:
        read(tmp_path, value)
    assert words in str(caught.value) and "recipe.json" in str(caught.value)
