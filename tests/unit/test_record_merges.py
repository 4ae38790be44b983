"""Merging from records against calibration runs of the same LoRAs together."""

from dataclasses import replace

import pytest
import torch
from helpers import rel
from recording import (
    SETTINGS,
    Attention,
    exact_calibration,
    identity_of,
    key_map,
    record_all,
    recorded_tasks,
    smallest_eigenvalue,
    tokens,
)

from ssr_core import (
    CalibrationError,
    IncompatibleError,
    RecordOptions,
    SampleOptions,
    Share,
    SSRMerge,
    Target,
    from_records,
    keep,
    merge,
    record,
)

EXACT = RecordOptions(columns=8, exact_limit=100, sampled_tokens=32)


@pytest.fixture
def world(tmp_path):
    model, tasks = Attention(), recorded_tasks(3)
    inputs = [[tokens(k)] for k in range(3)]
    return model, tasks, inputs, tmp_path


def deltas(tasks, calibration):
    return {t: layer.delta() for t, layer in merge(tasks, SSRMerge(), calibration).layers.items()}


def test_exact_records_give_the_calibration_of_all_together(world):
    model, tasks, inputs, folder = world
    shares, _ = record_all(folder, model, tasks, inputs, EXACT)
    found, truth = from_records(tasks, shares), exact_calibration(model, tasks, inputs, SampleOptions(32))
    assert found.stats.keys() == truth.stats.keys() and found.stack_tasks == truth.stack_tasks
    for target, stats in truth.stats.items():
        mine = found.stats[target]
        assert mine.ranks == stats.ranks and torch.equal(mine.tokens, stats.tokens)
        assert rel(mine.gram, stats.gram) < 2e-3  # half precision on disk
        assert torch.equal(found.signatures[target], truth.signatures[target])
        for one, other in zip(mine.samples, stats.samples, strict=True):
            assert rel(one.rows, other.rows) < 1e-3 and float(one.weights.std()) == float(other.weights.std()) == 0
    a, b = deltas(tasks, found), deltas(tasks, truth)
    assert max(rel(a[t], b[t]) for t in b) < 5e-3
    plain = deltas(tasks, exact_calibration(model, tasks, inputs))
    assert max(rel(plain[t], b[t]) for t in b) > 2e-2, "the sampled inputs change nothing: the test shows less"


def test_the_guide_is_exact_however_small_the_record_is(world):
    model, tasks, inputs, folder = world
    shares, _ = record_all(folder, model, tasks, inputs, RecordOptions(columns=1, exact_limit=0))
    found, truth = from_records(tasks, shares), exact_calibration(model, tasks, inputs)
    for target, stats in truth.stats.items():
        gaps = []
        for k in range(3):
            own, mine = slice(3 * k, 3 * k + 3), found.stats[target].gram[k]
            assert rel(mine[own], stats.gram[k][own]) < 3e-3
            assert float(mine.trace()) == pytest.approx(float(stats.gram[k].trace()), rel=0.6)
            gaps.append(rel(mine, stats.gram[k]))
            assert smallest_eigenvalue(mine) > -1e-9
        assert max(gaps) > 1e-2, "the rest is no longer approximate: the test shows nothing"


def test_a_record_is_good_for_any_set(world):
    model, tasks, inputs, folder = world
    shares, _ = record_all(folder, model, tasks, inputs)
    whole = from_records(tasks, shares)
    for chosen in ([0, 1], [2, 0], [1, 2]):
        alone = from_records([tasks[i] for i in chosen], [shares[i] for i in chosen])
        subset = keep(whole, chosen)
        assert alone.tasks == subset.tasks and alone.stack_tasks == subset.stack_tasks
        for target in alone.stats:
            assert rel(alone.stats[target].gram, subset.stats[target].gram) < 1e-12
            assert rel(alone.signatures[target], subset.signatures[target]) < 1e-12


def test_prompts_are_reweighted_and_dropped_without_a_pass(world):
    model, tasks, _, folder = world
    tasks = [replace(one, prompts=("a", "b")) for one in tasks]
    inputs = [[tokens(k), tokens(10 + k)] for k in range(3)]
    shares, _ = record_all(folder, model, tasks, inputs, EXACT)
    both = from_records(tasks, shares)
    weighted = [[Share(mine[0].record, 2.0), Share(mine[1].record, 0.0)] for mine in shares]
    first = [replace(one, prompts=("a",)) for one in tasks]
    found = from_records(first, weighted)
    second = from_records([replace(one, prompts=("b",)) for one in tasks], [[mine[1]] for mine in shares])
    for target, stats in both.stats.items():
        total = found.stats[target].gram / 2 + second.stats[target].gram
        assert rel(stats.gram, total) < 1e-12
        assert float(found.stats[target].tokens[0]) == 400.0
    truth = exact_calibration(model, tasks, inputs)
    assert rel(both.stats[Target("o")].gram, truth.stats[Target("o")].gram) < 2e-3


def test_tokens_of_several_prompts_are_sampled_together(world):
    model, tasks, _, folder = world
    tasks = [replace(one, prompts=("a", "b")) for one in tasks]
    shares, _ = record_all(folder, model, tasks, [[tokens(k), tokens(10 + k)] for k in range(3)], EXACT)
    weighted = [[mine[0], Share(mine[1].record, 0.5)] for mine in shares]
    for stats in from_records(tasks, weighted).stats.values():
        for sample in stats.samples:
            assert len(sample.rows) == 32 and float(sample.weights.sum()) == pytest.approx(300.0)
    bare, _ = record_all(folder / "bare", model, tasks[:1], [[tokens(0), tokens(10)]], RecordOptions(sampled_tokens=0))
    mixed = from_records(tasks, [bare[0], *shares[1:]])
    assert all(stats.samples is None for stats in mixed.stats.values())
    assert mixed.settings["records"]["unsampled"] == 4
    assert from_records(tasks, weighted).settings["records"]["unsampled"] == 0


def test_zero_weight_leaves_a_prompt_out(world):
    model, tasks, _, folder = world
    tasks = [replace(one, prompts=("a", "b")) for one in tasks]
    shares, _ = record_all(folder, model, tasks, [[tokens(k), tokens(10 + k)] for k in range(3)])
    off = [[mine[0], Share(mine[1].record, 0.0)] for mine in shares]
    first = [replace(one, prompts=("a",)) for one in tasks]
    alone = from_records(first, [[mine[0]] for mine in shares])
    for target, stats in from_records(first, off).stats.items():
        assert rel(stats.gram, alone.stats[target].gram) < 1e-12
    with pytest.raises(IncompatibleError, match="no weight"):
        Share(shares[0][0].record, -1.0)


def test_a_layer_that_never_ran_has_no_tokens(world):
    _, tasks, inputs, folder = world
    model = Attention()
    model.forward = lambda x: model.q(x)  # o, k, v stay silent
    shares, _ = record_all(folder, model, tasks, inputs)
    found = from_records(tasks, shares)
    assert float(found.stats[Target("o")].tokens.sum()) == 0 and not found.stats[Target("o")].complete
    assert found.stats[Target("q")].complete


def changed(root, library, one, **changes):
    layers = record(root, one, key_map(), lambda tap: root(tokens(1)), EXACT)
    return [Share(library.save(identity_of(one, **changes), EXACT, layers))]


REFUSED = {
    "seed": ({"settings": {**SETTINGS, "seed": 8}}, "seed 8 instead of 7"),
    "sigmas": ({"settings": {**SETTINGS, "sigmas": [1.0, 0.5]}}, r"sigmas \[1.0,0.5\] instead of \[1.0\]"),
    "model": ({"model": "other"}, "differ|belong together: model"),
    "text encoder": ({"text_encoder": "other"}, "text encoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_records_of_other_noise_or_models_are_refused(world, name):
    model, tasks, _, folder = world
    _, library = record_all(folder, model, [], [])
    first = changed(model, library, tasks[0], text_encoder="clip")
    changes, words = REFUSED[name]
    with pytest.raises(IncompatibleError, match=words) as caught:
        from_records(tasks[:2], [first, changed(model, library, tasks[1], **{"text_encoder": "clip"} | changes)])
    assert "lora1" in str(caught.value)
    given = changed(model, library, tasks[1], text_encoder="")  # a CONDITIONING that needed none
    from_records(tasks[:2], [first, given])


def test_records_of_other_content_prompts_or_conversion_are_refused(world):
    model, tasks, inputs, folder = world
    shares, _ = record_all(folder, model, tasks, inputs)
    with pytest.raises(IncompatibleError, match="other content"):
        from_records(tasks[:2], [shares[1], shares[0]])
    with pytest.raises(IncompatibleError, match="records are of the prompts lora0"):
        from_records([replace(tasks[0], prompts=("else",)), tasks[1]], shares[:2])
    with pytest.raises(IncompatibleError, match="none of its prompts"):
        from_records(tasks[:2], [shares[0], []])


def test_a_record_too_small_for_the_rank_says_what_size_would_do(world):
    model, _, inputs, folder = world
    tasks = recorded_tasks(3, names=("o",))
    shares, _ = record_all(folder, model, tasks, inputs, RecordOptions(columns=2, exact_limit=0))
    with pytest.raises(CalibrationError, match=r"rank 9") as caught:
        from_records(tasks, shares, small="refuse")
    needed = int(str(caught.value).split("columns ")[1].split()[0])
    assert needed < 10
    accepted = from_records(tasks, shares).settings["records"]
    assert accepted["small"] > 0 and accepted["columns"] == needed and 0 < accepted["unknown_energy"] < 1
    shares, _ = record_all(folder, model, tasks, inputs, RecordOptions(columns=needed, exact_limit=0))
    assert from_records(tasks, shares, small="refuse").settings["records"]["small"] == 0


def test_cancel_reaches_the_caller(world):
    model, tasks, inputs, folder = world
    shares, _ = record_all(folder, model, tasks, inputs)

    def tick(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        from_records(tasks, shares, tick=tick)


@pytest.mark.parametrize(
    ("encoders", "fit"),
    [(("", "a", ""), True), (("", "a", "a"), True), (("", "a", "b"), False), (("a", "", "b"), False)],
)
def test_text_encoders_are_compared_whichever_record_names_one_first(tmp_path, encoders, fit):
    """A record of a CONDITIONING names none and fits any; two that name others never fit."""
    tasks = recorded_tasks(3)
    shares, _ = record_all(tmp_path, Attention(), tasks, [[tokens(k)] for k in range(3)])
    given = []
    for (share,), encoder in zip(shares, encoders, strict=True):
        identity = replace(share.record.identity, text_encoder=encoder)
        given.append([replace(share, record=replace(share.record, identity=identity))])
    if fit:
        assert len(from_records(tasks, given).tasks) == 3
    else:
        with pytest.raises(IncompatibleError, match="text encoder"):
            from_records(tasks, given)
