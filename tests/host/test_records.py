"""Records through the real server: made once, merged in any set, refused with their reason."""

import re
import shutil

import pytest
from safetensors.torch import load_file

from .loras import family_lora
from .merging import SEED, MergeGraph, Task
from .osrm import deltas

FAMILY = "flux"


@pytest.fixture(autouse=True)
def library(base):
    """An empty library before each test."""
    folder = base / "output" / "calibrations" / "records"
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    for path in (base / "models" / "loras").glob("*.ssrrecord"):
        path.unlink()


def loras(base, count=3, family=FAMILY):
    return [
        Task(family_lora(base, family, "kohya", seed=60 + i, name=f"rec_{family}_{i}"), (1.0, 0.8, 1.2)[i], 700 + i)
        for i in range(count)
    ]


def run(server, kind, tasks, prefix="", **options):
    """A node of LoRAs, its saved LoRA if there is one, and its result."""
    graph = MergeGraph(server)
    node = graph.merge(FAMILY, tasks, kind, **options)
    if prefix:
        graph.save(node, prefix)
    return server.run(graph.prompt), node


def saved(base, prefix):
    (path,) = (base / "output" / "loras").glob(f"{prefix}_*.safetensors")
    found = deltas(load_file(path))
    path.unlink()
    return found


def distance(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


def counts(text):
    return tuple(map(int, re.search(r"Records: (\d+) found, (\d+) made", text).groups()))


def test_any_set_is_merged_without_a_pass_as_if_it_had_been_calibrated(server, base, library):
    tasks = loras(base)
    result, node = run(server, "SSRRecord", tasks, exact_limit=4096)
    text = result.ok().text(node)
    assert counts(text) == (0, 3) and len(list(library.iterdir())) == 3
    for chosen in ([0, 1], [1, 2], [2, 0, 1]):
        some = [tasks[i] for i in chosen]
        result, node = run(server, "SSRMergeFromRecords", some, "rec_from", missing="refuse", exact_limit=4096)
        text = result.ok().text(node)
        assert counts(text) == (len(some), 0)
        run(server, "SSRMerge", some, "rec_whole")[0].ok()
        assert distance(saved(base, "rec_from"), saved(base, "rec_whole")) < 0.02  # half precision on disk
    result, node = run(server, "SSRRecord", tasks, exact_limit=4096, steps=1)
    assert counts(result.ok().text(node)) == (3, 0)


def test_small_records_are_close_and_say_how_much_they_lack(server, base, library):
    tasks = loras(base, 2)
    result, node = run(
        server, "SSRMergeFromRecords", tasks, "rec_small", exact_limit=0, columns=1, small_records="accept"
    )
    text = result.ok().text(node)
    assert counts(text) == (0, 2) and "of their layers' energy" in text
    run(server, "SSRMerge", tasks, "rec_whole")[0].ok()
    run(server, "SSRMerge", tasks, "rec_sum", mode="sum")[0].ok()
    whole, small, plain = (saved(base, prefix) for prefix in ("rec_whole", "rec_small", "rec_sum"))
    gaps = [float(sum((one[n] - whole[n]).square().sum() for n in whole) ** 0.5) for one in (small, plain)]
    assert 0 < gaps[0] < gaps[1]


def test_prompts_and_text_encoders_are_recorded_one_by_one(server, base, library):
    from .weights import dumped, shapes_of

    graph = MergeGraph(server)
    graph.dump(graph.add("TinyCLIP", kind="sd15", seed=0), "rec_clip")
    server.run(graph.prompt).ok()
    shapes = shapes_of(dumped(base, "rec_clip"))
    files = [family_lora(base, "sd15", "kohya", s, name=f"rec_te_{s}", text_encoder=shapes) for s in (71, 72)]

    def merge(kind, prompts, prefix, **options):
        graph = MergeGraph(server)
        chain = [graph.pack("SSRLoRA", lora=f.name, prompts=p) for f, p in zip(files, prompts, strict=True)]
        values = {"model": graph.checkpoint("sd15"), "clip": graph.add("TinyCLIP", kind="sd15", seed=0)}
        # one sample of two prompts is another draw than one of each
        node = graph.join(kind, chain, **values, latent=graph.latent("sd15"), sampled_tokens=0, **options)
        graph.save(node, prefix)
        return server.run(graph.prompt).ok().text(node)

    both = ("a red fox\na fox in snow", "a heron\na heron in reeds at dawn")
    text = merge("SSRMergeFromRecords", both, "rec_prompts", exact_limit=8192)
    assert counts(text) == (0, 4)
    merge("SSRMerge", both, "rec_te_whole")
    assert distance(saved(base, "rec_prompts"), saved(base, "rec_te_whole")) < 0.02
    text = merge(
        "SSRMergeFromRecords", both, "rec_te_one", exact_limit=8192, missing="refuse", prompt_weights="1 0\n0 2"
    )
    assert counts(text) == (4, 0)
    merge("SSRMerge", ("a red fox", "a heron in reeds at dawn"), "rec_te_two")
    assert distance(saved(base, "rec_te_one"), saved(base, "rec_te_two")) < 0.02


def test_what_is_missing_is_refused_with_the_reason(server, base, library):
    tasks = loras(base, 2)
    run(server, "SSRRecord", tasks)[0].ok()
    refused = {"missing": "refuse"}
    result, _ = run(server, "SSRMergeFromRecords", tasks, "no", **refused, seed=SEED + 1)
    assert f"seed {SEED} instead of {SEED + 1}" in result.error and "2 passes have no record" in result.error
    result, _ = run(server, "SSRMergeFromRecords", loras(base, 3), "no", **refused)
    assert "no record was made of this LoRA" in result.error and "rec_flux_2" in result.error
    weaker = [Task(tasks[0].file, 0.5, tasks[0].text_seed), tasks[1]]
    result, _ = run(server, "SSRMergeFromRecords", weaker, "no", **refused)
    assert "strength [1.0,1.0] instead of [0.5,0.5]" in result.error or "strength [1.0,0.0] instead of" in result.error
    path = base / "models" / "loras" / tasks[0].file.name
    content = path.read_bytes()
    try:
        family_lora(base, FAMILY, "kohya", seed=99, name="rec_other")
        path.write_bytes((base / "models" / "loras" / "rec_other.safetensors").read_bytes())
        result, _ = run(server, "SSRMergeFromRecords", tasks, "no", **refused)
        assert "the file changed since the record" in result.error
    finally:
        path.write_bytes(content)


def test_a_damaged_record_is_never_believed_and_made_again(server, base, library):
    tasks = loras(base, 2)
    run(server, "SSRRecord", tasks)[0].ok()
    broken = sorted(library.iterdir())[0]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-100])
    result, _ = run(server, "SSRMergeFromRecords", tasks, "no", missing="refuse")
    assert "is refused" in result.error and broken.name in result.error
    result, node = run(server, "SSRMergeFromRecords", tasks, "rec_again", steps=1)
    assert counts(result.ok().text(node)) == (1, 1) and len(broken.read_bytes()) == len(whole)
    saved(base, "rec_again")


def test_the_library_is_listed_and_cleaned(server, base, library):
    tasks = loras(base, 2)
    run(server, "SSRRecord", tasks[:1])[0].ok()
    run(server, "SSRRecord", tasks[1:], store="beside the LoRA")[0].ok()
    beside = list((base / "models" / "loras").glob("*.ssrrecord"))
    assert len(beside) == 1 and len(list(library.iterdir())) == 1

    def look(action):
        graph = MergeGraph(server)
        node = graph.pack("SSRRecordLibrary", action=action)
        return server.run(graph.prompt).ok().text(node)

    text = look("list")
    assert "2 records" in text and all(task.file.name in text for task in tasks)
    result, node = run(server, "SSRMergeFromRecords", tasks, "rec_both", missing="refuse")
    assert counts(result.ok().text(node)) == (2, 0)
    saved(base, "rec_both")
    assert "Removed 0 of 2" in look("clean")
    beside[0].write_bytes(b"broken")
    assert "Would remove 1 of 2" in look("clean (only say which)") and beside[0].exists()
    assert "Removed 1 of 2" in look("clean") and not beside[0].exists()
    assert "1 record," in look("list")
    assert not [
        name
        for name in server.schemas(refresh=True)["SSRLoRA"]["input"]["required"]["lora"]
        if "ssrrecord" in str(name)
    ]


def test_cancel_while_recording_leaves_no_record(server, base, library):
    graph = MergeGraph(server)
    node = graph.merge(FAMILY, loras(base, 2), "SSRRecord", steps=100, latent=graph.latent(FAMILY, 512))
    prompt = server.submit(graph.prompt)
    server.wait_event(prompt, lambda event, data: event == "progress" and data["node"] == node.id and data["value"])
    server.interrupt()
    assert server.wait(prompt, timeout=60).status == "interrupted"
    assert not library.exists() or list(library.iterdir()) == []
