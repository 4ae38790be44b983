"""What a stranger's recipe or merged file may not start."""

import pytest

from ssr_core import FileError, parse_recipe
from ssr_core.trust import check_graph, pack_path


def graph(kind, **more):
    return {"graph": {"1": {"class_type": kind, "inputs": {}}}, "model": ["1", 0], **more}


def test_loaders_of_comfyui_need_no_trust():
    check_graph({"checkpoint": "a.safetensors"}, "x")
    check_graph({}, "x")
    check_graph(graph("UNETLoader", custom_nodes=[]), "x")


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (graph("SaveImage"), "SaveImage"),
        (graph("DiffusersLoader"), "DiffusersLoader"),
        (graph("UNETLoader", custom_nodes=["gguf"]), "gguf"),
    ],
)
def test_other_nodes_and_packs_are_refused_by_name(model, word):
    with pytest.raises(FileError, match=word) as found:
        check_graph(model, "merged.safetensors")
    assert "--trust-graph" in str(found.value) and "merged.safetensors" in str(found.value)


@pytest.mark.parametrize("name", ["", ".", "..", "../outside", "a/b", "a\\b", "c:evil", "/tmp", "a\0"])
def test_a_pack_is_one_folder_of_the_root(tmp_path, name):
    (tmp_path / "outside").mkdir()
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    with pytest.raises(FileError, match="not the name of one folder") as found:
        pack_path(name, [str(root)])
    assert repr(name) in str(found.value)


def test_a_pack_is_looked_for_in_every_root(tmp_path):
    (tmp_path / "two" / "pack").mkdir(parents=True)
    roots = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert pack_path("pack", roots) == tmp_path / "two" / "pack"
    with pytest.raises(FileError, match="no custom_nodes folder"):
        pack_path("other", roots)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"graph": {"1": 3}, "model": ["1", 0]}, "model.graph.1"),
        ({"graph": {"1": {"inputs": {}}}, "model": ["1", 0]}, "model.graph.1"),
        ({"graph": {"1": {"class_type": "UNETLoader", "inputs": []}}, "model": ["1", 0]}, "model.graph.1"),
        (graph("UNETLoader", clip_link=["1"]), "model.clip_link"),
        ({**graph("UNETLoader"), "model": ["1", "x"]}, "model.model"),
    ],
)
def test_graphs_of_another_shape_are_named(model, words):
    with pytest.raises(FileError, match=words):
        parse_recipe({"sources": [{"name": "a"}], "model": model}, "x")
