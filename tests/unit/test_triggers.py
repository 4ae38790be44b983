"""Trigger words out of headers that strangers wrote."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssr_core import FileError, header_metadata, trigger_words, write_safetensors

TAGS = {"10_sks dog": {"sks dog": 12, "outdoors": 5}, "reg": {"outdoors": 4, "dog": 1}}


def test_tags_are_added_up_over_folders_and_folders_name_concepts():
    found = trigger_words({"ss_tag_frequency": json.dumps(TAGS)})
    assert found.tags == (("sks dog", 12), ("outdoors", 9), ("dog", 1))
    assert found.phrases == ("sks dog",)


def test_phrases_in_order_without_repeats():
    metadata = {
        "modelspec.trigger_phrase": " zwx\ncat ",
        "ss_trigger_words": json.dumps(["zwx cat", "zwx"]),
        "ss_dataset_dirs": json.dumps({"3_zwx": {}, "plain": {}}),
        "ss_datasets": json.dumps([{"subsets": [{"class_tokens": "cat"}, 3]}, 4]),
        "modelspec.title": "Cat",
    }
    found = trigger_words(metadata)
    assert found.phrases == ("zwx cat", "zwx", "cat")
    assert found.title == "Cat"


def test_a_merged_file_offers_its_prompts():
    recipe = {"sources": [{"prompts": ["a photo of sks dog"]}, {"prompts": ["a zwx cat"]}]}
    assert trigger_words({"ssr_merge": json.dumps(recipe)}).phrases == ("a photo of sks dog", "a zwx cat")


def test_metadata_comes_from_the_header_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": torch.zeros(4)}, {"modelspec.title": "Dog", "n": "1"})
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    path.write_bytes(whole[: 8 + length])  # the tensors are gone
    assert header_metadata(path) == {"modelspec.title": "Dog", "n": "1"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 33 << 20) + b" " * 64,
        struct.pack("<Q", 4) + b"{}",
        struct.pack("<Q", 4) + b"{a}b",
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
)
def test_damaged_headers_are_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"bad\.safetensors"):
        header_metadata(path)


def test_a_header_without_metadata_says_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    for text in (b"[1]", b'{"__metadata__": 3}', b'{"__metadata__": {"a": 1}}'):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        assert header_metadata(path) == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
NAMES = st.sampled_from(
    ["ss_tag_frequency", "ss_dataset_dirs", "ss_datasets", "ssr_merge", "ss_trigger_words", "modelspec.trigger_phrase"]
)


@settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(NAMES, st.text(max_size=40) | JSON.map(json.dumps), max_size=6))
def test_whatever_a_stranger_wrote_the_answer_is_short_printable_text(metadata):
    found = trigger_words(metadata)
    for word in (*found.phrases, *(tag for tag, _ in found.tags)):
        assert word and word.isprintable() and len(word) <= 200
    assert len(found.phrases) <= 40 and len(found.tags) <= 40


def test_long_lists_are_cut():
    many = {"10_x": {f"tag {i}": i + 1 for i in range(5000)}}
    found = trigger_words({"ss_tag_frequency": json.dumps(many), "modelspec.trigger_phrase": "y" * 5000})
    assert len(found.tags) == 40 and found.tags[0] == ("tag 4999", 5000)
    assert len(found.phrases[0]) == 200
