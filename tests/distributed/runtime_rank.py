"""What the runtime's distributed tests ask of ranks and remember of it; Megatron is imported on ranks only."""

import numpy as np
from runtime_cases import EVERY, LONG, MODELS, reference

_references, _trained = {}, {}


def train(rank, world_size, case):
    """Runs on every rank: trains a case through Megatron's pretrain."""
    from runtime_job import run_case

    seen = run_case(case)
    if rank:
        del seen["weights"]
    return seen


def trained_once(ranks, case):
    """What every rank saw of a case on four ranks, which is run once for all tests that look at it."""
    key = repr(case)
    if key not in _trained:
        _trained[key] = ranks(4).run(train, case)
    return _trained[key]


def references(ranks):
    """What one rank of stock Megatron saw of every model; trained once per test session."""
    if not _references:
        for model in MODELS:
            _references[model] = ranks(1).run(train, reference(model))[0]
    return _references


def expected_of(ranks, made):
    """What the reference saw in as many steps as a case has, its weights after them included."""
    seen, steps = references(ranks)[made["model"]], made["arguments"]["train-iters"]
    weights = seen["weights"] if steps == LONG else seen["weights_after"][steps]
    found = {key: seen[key][:steps] for key in ("losses", "norms", "skipped")}
    if made["arguments"].get("eval-iters"):
        found["evaluated"] = seen["evaluated"][: steps // EVERY]
    return found | {"weights": weights}


def relative(values, expected):
    """Largest relative difference between two series."""
    values, expected = np.asarray(values, dtype=float), np.asarray(expected, dtype=float)
    assert values.shape == expected.shape
    return float(np.max(np.abs(values - expected) / np.abs(expected)))


def weight_difference(weights, expected):
    """Largest relative two-norm by which any weight differs; rows that only pad the vocabulary are left out."""
    assert weights.keys() == expected.keys()
    worst = 0.0
    for name, wanted in expected.items():
        value = weights[name]
        if value.shape != wanted.shape:
            rows = min(len(value), len(wanted))
            value, wanted = value[:rows], wanted[:rows]
        assert np.isfinite(value).all(), f"{name} has a hole"
        worst = max(worst, float(np.linalg.norm(value - wanted) / np.linalg.norm(wanted)))
    return worst


def assert_same_training(seen, expected, steps=slice(None), tolerance=1e-5, *, weights=True):
    """Losses, gradient norms and final weights agree, and all copies of a weight are equal to the bit.

    So do the losses of evaluations, where there are any. No plan has a communicator of its own over ranks that
    have one already.
    """
    assert not seen["created_again"], "communicators that were there"
    assert relative(seen["losses"], expected["losses"][steps]) < tolerance
    assert relative(seen["norms"], expected["norms"][steps]) < tolerance
    if "evaluated" in expected and steps == slice(None):
        # One more when the job is over, on other samples than the reference's next.
        assert relative(seen["evaluated"][:-1], expected["evaluated"]) < tolerance
    assert seen["copies_differ"] == 0.0
    if weights:
        assert weight_difference(seen["weights"], expected["weights"]) < tolerance
