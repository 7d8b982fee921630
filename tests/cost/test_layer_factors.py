"""Layer factors find again what shared layers took, and nothing where too few runs share one."""

from dataclasses import replace

import pytest

from galvatron_megatron.commands.validate import shipped_table
from galvatron_megatron.cost.layer_factors import LEAST_RUNS, fit_layer_factors
from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.cost.records.tables import read_table
from galvatron_megatron.cost.records.values import MeasuredRun
from galvatron_megatron.cost.validation import Predictor, shipped_test_bed
from galvatron_megatron.describe.cluster import Cluster, cluster_document, read_cluster
from galvatron_megatron.errors import DescriptionError

BED = replace(shipped_test_bed("vtrain-single"), layer_factors=())
RUNS = [run for run in read_table(shipped_table("vtrain_a100_single")).runs if run.plan.base.tp == 2][:60]
"""Runs with few layers in many plans."""


def work_of(run: MeasuredRun) -> tuple[int, int, int]:
    setting = Setting.of(run.plan)
    return Predictor(lambda _: BED).cost_model(run).layer_work(0, run.plan.layers[0].strategy, setting)


def measured_on(cluster: Cluster) -> list[MeasuredRun]:
    predict = Predictor(lambda _: cluster)
    return [replace(run, step_seconds=predict(run)[0]) for run in RUNS]


def test_a_slow_layer_is_found_and_predicts_other_plans() -> None:
    slow = work_of(RUNS[0])
    truth = replace(BED, layer_factors=((*slow, 1.3),))
    runs = measured_on(truth)
    shared = [run for run in runs if work_of(run) == slow]
    held_out, fitted = shared[-1], [run for run in runs if run is not shared[-1]]
    assert len(shared) > LEAST_RUNS
    learnt = fit_layer_factors(BED, fitted, 0.1)
    factors = {entry[:3]: entry[3] for entry in learnt.layer_factors}
    assert factors.pop(slow) == pytest.approx(1.3, rel=0.03)
    # The head of the same runs takes a part of the blame; no layer of other runs does.
    assert sorted(factors.values())[1:-1] == pytest.approx([1] * (len(factors) - 2), abs=0.02)
    before, after = (Predictor(lambda _, bed=bed: bed)(held_out)[0] for bed in (BED, learnt))
    assert before < 0.95 * held_out.step_seconds
    assert after == pytest.approx(held_out.step_seconds, rel=0.02)
    assert learnt == fit_layer_factors(BED, fitted, 0.1)


def test_an_odd_run_does_not_pull() -> None:
    runs = measured_on(BED)
    runs[0] = replace(runs[0], step_seconds=runs[0].step_seconds * 3)
    learnt = fit_layer_factors(BED, runs, 0.1)
    assert all(entry[3] == pytest.approx(1, abs=0.05) for entry in learnt.layer_factors)


def test_single_rows_get_no_factor() -> None:
    alone = {work_of(run): run for run in measured_on(BED)}.values()
    few = [replace(run, step_seconds=2 * run.step_seconds) for run in alone][: LEAST_RUNS - 1]
    assert fit_layer_factors(BED, few, 0.1).layer_factors == ()


def test_factors_change_what_an_estimate_says(tmp_path) -> None:
    run = RUNS[0]
    setting, strategy = Setting.of(run.plan), run.plan.layers[0].strategy
    cluster = replace(BED, layer_factors=((*work_of(run), 1.25),))
    plain, corrected = (
        Predictor(lambda _, bed=bed: bed).cost_model(run).priced_layer(0, strategy, setting)
        for bed in (BED, cluster)
    )
    assert corrected.cost.micro_batch_seconds == pytest.approx(1.25 * plain.cost.micro_batch_seconds)
    assert corrected.cost.activation_bytes == plain.cost.activation_bytes
    terms = [term for term in corrected.micro_batch_terms if term.source == "measured"]
    assert sum(term.value for term in terms) == pytest.approx(0.25 * plain.cost.micro_batch_seconds)
    assert sum(term.value for term in corrected.micro_batch_terms) == pytest.approx(
        corrected.cost.micro_batch_seconds
    )
    file = tmp_path / "bed.yaml"
    file.write_text(cluster_document(cluster), encoding="utf-8")
    assert read_cluster(file) == cluster
    assert cluster.fingerprint() != BED.fingerprint()


@pytest.mark.parametrize(
    "entry", [(1, 2, 1.0), (1, 2, -3, 1.0), (1, 2, 3, 0.0), (1, 2, 3, "1"), (1.5, 2, 3, 1.0)]
)
def test_malformed_factors(entry: tuple) -> None:
    with pytest.raises(DescriptionError, match="layer_factors"):
        replace(BED, layer_factors=(entry,))
