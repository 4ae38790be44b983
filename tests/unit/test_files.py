"""Reading files of strangers, writing files that are never half there."""

import errno
import hashlib
import pickle
import struct
from pathlib import Path

import pytest
import torch
from helpers import randn
from safetensors.torch import save_file

from ssr_core import FileError, atomic_path, content_hash, read_safetensors, tensors_hash, write_safetensors

TENSORS = {"a": randn(1, 3, 4, dtype=torch.float16), "b": randn(2, 5, dtype=torch.bfloat16), "c": torch.tensor(1.5)}


def save(path, metadata=None):
    save_file(TENSORS, path, metadata or {"k": "v"})
    return path


def refused(path, match):
    with pytest.raises(FileError, match=match) as caught:
        read_safetensors(path)
    assert path.name in str(caught.value)


def test_round_trip_is_bit_exact(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS, {"name": "ü"})
    tensors, metadata = read_safetensors(path)
    assert metadata == {"name": "ü"} and set(tensors) == set(TENSORS)
    assert all(tensors[k].dtype == v.dtype and torch.equal(tensors[k], v) for k, v in TENSORS.items())


def test_every_length_of_header_is_read(tmp_path):
    """The first byte of a good file is the header's length: 0x80 there is no pickle."""
    first = set()
    for padding in range(0, 280, 8):
        path = save(tmp_path / f"{padding}.safetensors", {"k": "v" * padding})
        first.add(path.read_bytes()[0])
        assert torch.equal(read_safetensors(path)[0]["a"], TENSORS["a"])
    assert 0x80 in first


def test_a_header_whose_length_spells_pk_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    length = int.from_bytes(b"PK", "little")
    for padding in range(length - 400, length):
        save(path, {"k": "v" * padding})
        if path.read_bytes()[:2] == b"PK":
            break
    assert path.read_bytes()[:2] == b"PK"
    assert torch.equal(read_safetensors(path)[0]["a"], TENSORS["a"])


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_pickles_are_refused_by_content(tmp_path, zipped):
    path = tmp_path / "lora.safetensors"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    refused(path, "pickle")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_pickles_are_refused_and_never_run(tmp_path, protocol):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (type(marker).touch, (marker,))

    path = tmp_path / "lora.safetensors"
    path.write_bytes(pickle.dumps(Evil(), protocol=protocol))
    refused(path, "pickle")
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl", ".PT"])
def test_pickle_names_are_refused_whatever_is_inside(tmp_path, suffix):
    refused(save(tmp_path / f"x{suffix}"), "pickle")


@pytest.mark.parametrize("keep", [0, 5, 8, 20, -1, -10])
def test_truncated(tmp_path, keep):
    path = save(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "not a whole safetensors file")


@pytest.mark.parametrize(
    "content",
    [b"\x00" * 64, b"<html>not found</html>", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]"],
)
def test_garbage(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(path, "not a whole safetensors file")


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.safetensors", "does not exist")
    refused(tmp_path, "does not exist")
    with pytest.raises(FileError, match=r"none\.safetensors"):
        content_hash(tmp_path / "none.safetensors")


def test_content_hash_is_sha256_of_the_bytes(tmp_path):
    path = tmp_path / "x"
    data = bytes(range(256)) * 20000  # several read blocks
    path.write_bytes(data)
    assert content_hash(path) == hashlib.sha256(data).hexdigest()


def test_tensors_hash_sees_names_dtypes_shapes_and_values_but_not_order():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    base = tensors_hash({"a": a, "b": b})
    assert tensors_hash({"b": b, "a": a}) == base == tensors_hash({"a": a.T.contiguous().T, "b": b.clone()})
    others = [
        {"a": a, "c": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a.double(), "b": b},
        {"a": a + 1e-6, "b": b},
        {"a": a},
        {"a": b, "b": a},
    ]
    assert len({base, *(tensors_hash(other) for other in others)}) == len(others) + 1


class CancelError(BaseException):
    pass


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, CancelError])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_failed_write_leaves_nothing(tmp_path, failure, overwrite):
    path = tmp_path / "out.safetensors"
    if overwrite:
        path.write_bytes(b"old")
    with pytest.raises(failure), atomic_path(path, overwrite) as temporary:
        temporary.write_bytes(b"half")
        raise failure
    assert [p.name for p in tmp_path.iterdir()] == (["out.safetensors"] if overwrite else [])
    assert not overwrite or path.read_bytes() == b"old"


def test_an_existing_file_stays_unless_overwrite_is_asked(tmp_path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(FileError, match="exists already"), atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with atomic_path(path, overwrite=True) as temporary:
        assert temporary.parent.parent == path.parent and path.read_bytes() == b"old"
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_a_name_that_is_taken_while_writing_is_not_overwritten(tmp_path):
    path = tmp_path / "out.safetensors"
    with pytest.raises(FileError, match="exists already"), atomic_path(path) as temporary:
        temporary.write_bytes(b"mine")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs" and len(list(tmp_path.iterdir())) == 1


def test_folders_are_made_and_a_file_in_the_way_is_an_error(tmp_path):
    with atomic_path(tmp_path / "a" / "b" / "c.bin") as temporary:
        temporary.write_bytes(b"x")
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"x"
    with pytest.raises(FileError, match="cannot write here"), atomic_path(tmp_path / "a" / "b" / "c.bin" / "d"):
        pass


def test_written_files_have_ordinary_permissions(tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours.safetensors"
    plain.write_bytes(b"")
    with atomic_path(ours) as temporary:
        write_safetensors(temporary, TENSORS, {})
    assert ours.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fills_up_while_text_is_written_is_no_traceback(tmp_path, overwrite):
    path = tmp_path / "merged.report.md"
    if overwrite:
        path.write_text("earlier")
    with pytest.raises(FileError, match="No space left") as found, atomic_path(path, overwrite) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary))
    assert str(path) in str(found.value) and "free disk space" in str(found.value)
    assert [one.read_text() for one in tmp_path.iterdir()] == (["earlier"] if overwrite else [])


def test_an_interruption_claims_no_more_than_is_true():
    """A calibration, or the merge without its reports, may be there already."""
    text = (Path(__file__).resolve().parents[2] / "headless" / "cli.py").read_text(encoding="utf-8")
    assert "nothing was written" not in text
