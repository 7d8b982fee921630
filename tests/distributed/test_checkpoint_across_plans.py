"""A checkpoint saved under one plan goes on under another as if the job had never stopped."""

import pytest
from runtime_cases import LONG, case
from runtime_rank import assert_same_training, references, relative, train, weight_difference

pytestmark = pytest.mark.distributed
HALFWAY = 5
PLANS = {
    "mixed": (4, "tp1", [["tp1", "tp2", "tp4 zero1", "tp4+ulysses"]], {}),
    "split": (
        4,
        "tp2+megatron zero1",
        [["tp4+megatron zero1", "tp1 zero1", "tp2", "tp1 recompute-full"]],
        {"arguments": {"ckpt-fully-parallel-load": True}},
    ),
    "pipeline": (4, "tp2 zero1", [["tp2+megatron zero1", "tp1"], ["tp1 zero1", "tp2"]], {"pp": 2}),
    "uneven": (4, "tp1", [["tp2"], ["tp1", "tp2+ulysses", "tp1"]], {"pp": 2}),
    "uniform": (4, "tp2 zero1", [["tp2 zero1"] * 4], {}),
    "interleaved": (4, "tp1", [["tp1"]] * 4, {"pp": 2, "virtual": 2, "micro_batches": 4, "micro_batch": 1}),
    "two": (2, "tp1", [["tp2", "tp1", "tp2+megatron zero1", "tp1"]], {}),
    "one": (1, "tp1", [["tp1"] * 4], {}),
    "apart": (4, "tp1", [["tp1", "tp2", "tp4+megatron", "tp4+ulysses zero1"]], {}),
    "alike": (4, "tp2 zero1", [["tp2 zero1", "tp2 zero1"]] * 2, {"pp": 2, "pattern": "*-|*-"}),
    "gradients": (
        4,
        "tp1 zero2",
        [["tp1 zero2", "tp2+megatron zero3", "tp4 zero2", "tp2 zero1"]],
        {"arguments": {"ckpt-fully-parallel-load": True}},
    ),
    "parameters": (4, "tp2 zero3", [["tp1 zero3", "tp2 zero3"], ["tp2+megatron zero2", "tp1"]], {"pp": 2}),
    "shared-out": (4, "tp1", [["tp2", "tp1 ep2", "tp2+megatron ep2 zero1", "tp1 cp2"]], {}),
    "in-parts": (4, "tp2+megatron zero1", [["tp4", "tp4+megatron", "tp1 ep4 zero1", "tp2 zero1"]], {}),
    "scanned": (4, "tp2", [["tp2+megatron zero1", "tp1"], ["tp1 zero1", "tp2"]], {"pp": 2, "pattern": "M*|M-"}),
    "stock": (4, "tp2", [["tp2"] * 4], {"detached": True}),
    "stock-sharded": (
        4,
        "tp2 zero1",
        [["tp2 zero1"] * 4],
        {"detached": True, "arguments": {"dist-ckpt-optim-fully-reshardable": True}},
    ),
}
PAIRS = (
    ("mixed", "pipeline"),
    ("mixed", "uniform"),
    ("split", "mixed"),
    ("split", "interleaved"),
    ("pipeline", "uneven"),
    ("uneven", "split"),
    ("uniform", "mixed"),
    ("interleaved", "split"),
    ("gradients", "parameters"),
    ("gradients", "uniform"),
)
KINDS = (
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "zero1 offload-optimizer",
    "zero2 offload-optimizer",
    "zero3 offload-optimizer",
    "zero3 offload-parameters",
)
"""How a layer's states are kept, in the order of the layers of the job that saves them."""
ORDERS = (
    (6, 5, 0, 4, 1, 3, 7, 2),
    (0, 3, 1, 5, 2, 4, 6, 7),
    (5, 2, 7, 0, 3, 6, 1, 4),
    (4, 0, 3, 7, 6, 5, 2, 1),
)
"""By layer, how jobs keep them that go on from there: each changes all layers in a way that no other does."""
OTHER_WORLDS = (("mixed", "two"), ("mixed", "one"), ("parameters", "one"), ("one", "split"))


def of(name, model, arguments):
    world_size, base, stages, options = PLANS[name]
    arguments = {"train-iters": LONG, **options.get("arguments", {}), **arguments}
    return world_size, case(name, model, base, *stages, **{**options, "arguments": arguments})


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """Directories of checkpoints at halfway, by plan."""
    folders = {}

    def folder(name, model="modern"):
        if (name, model) not in folders:
            where = tmp_path_factory.mktemp(f"{model}-{name}")
            arguments = {"save": str(where), "save-interval": HALFWAY, "train-iters": HALFWAY}
            world_size, made = of(name, model, arguments)
            everyone = ranks(world_size).run(train, made)
            folder.saves[name, model], seen = [rank["saves"] for rank in everyone], everyone[0]
            tolerance = 1e-2 if model == "bf16" else 1e-5
            assert_same_training(seen, references(ranks)[model], slice(0, HALFWAY), tolerance, weights=False)
            folders[name, model] = where
        return folders[name, model]

    folder.saves = {}
    return folder


def goes_on(ranks, saved, before, after):
    arguments = {"load": str(saved(before)), "override-opt-param-scheduler": True}
    world_size, made = of(after, "modern", arguments)
    seen = ranks(world_size).run(train, made)[0]
    assert len(seen["losses"]) == LONG - HALFWAY, "the job must resume where the other stopped"
    assert_same_training(seen, references(ranks)["modern"], slice(HALFWAY, None))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_goes_on_under_another_plan(ranks, saved, before, after):
    goes_on(ranks, saved, before, after)


def kept_in(order, *, pp=1, **options):
    """A plan of eight layers whose states are kept in every way, at changing tp."""
    words = [f"tp{2 if number % 3 else 1} {KINDS[kind]}" for number, kind in enumerate(order)]
    stages = [words] if pp == 1 else [words[:5], words[5:]]
    arguments = {"train-iters": 4, "override-opt-param-scheduler": True, **options.pop("arguments", {})}
    return case("kept", "modern", f"tp1 {KINDS[order[0]]}", *stages, pp=pp, arguments=arguments, **options)


@pytest.fixture(scope="module")
def kept(ranks, tmp_path_factory):
    """A checkpoint with states kept in every way, and what the job saw that saved it and went on."""
    where = tmp_path_factory.mktemp("kept")
    made = kept_in(range(8), arguments={"save": str(where), "save-interval": 2})
    return where, ranks(4).run(train, made)[0]


@pytest.mark.parametrize("order", ORDERS)
def test_states_of_every_stage_go_on_under_every_other(ranks, kept, order):
    where, expected = kept
    made = kept_in(order, pp=1 + order[0] % 2, arguments={"load": str(where), "ckpt-step": 2})
    seen = ranks(4).run(train, made)[0]
    assert len(seen["losses"]) == 2
    assert_same_training(seen, expected, slice(2, None))


def test_the_orders_hold_every_pair_of_stages_and_of_places():
    stages = [int(kind[4]) for kind in KINDS]
    places = [kind.partition(" ")[2] for kind in KINDS]
    for values in (stages, places):
        pairs = {(values[before], values[after]) for order in ORDERS for before, after in enumerate(order)}
        assert pairs == {(before, after) for before in values for after in values}
    assert len({(before, after) for order in ORDERS for before, after in enumerate(order)}) == 32


def writes_late(rank, world_size, made):
    from late_saves import train_beside_saves

    seen = train_beside_saves(made)
    if rank:
        del seen["weights"]
    return seen


def test_an_asynchronous_save_has_no_changes_of_later_steps(ranks, tmp_path):
    """Its writer reads tensors in host memory when it writes: here behind the next step."""
    arguments = {"save": str(tmp_path), "save-interval": 2}
    asynchronous = {"late_arguments": {"async_save": True, "async_strategy": "mcore"}}
    expected = ranks(4).run(writes_late, kept_in(range(8), arguments=arguments, **asynchronous))[0]
    made = kept_in(ORDERS[1], arguments={"load": str(tmp_path), "ckpt-step": 2})
    seen = ranks(4).run(train, made)[0]
    assert_same_training(seen, expected, slice(2, None))


@pytest.mark.parametrize("name", ["uniform", "split", "gradients"])
def test_what_is_sharded_is_saved_where_it_lies(saved, name):
    """Not copied, not sent: by Megatron's own code under a plan, where layers differ, and by ZeRO 2 and 3."""
    saved(name)
    for (save,) in saved.saves[name, "modern"]:
        assert save["bytes"] > 0 and save["copied"] == save["communicated"] == 0
    total = sum(save["bytes"] for (save,) in saved.saves[name, "modern"])
    # Stock Megatron gathers, so that every rank has what others keep.
    saved("stock-sharded")
    stock = [save for (save,) in saved.saves["stock-sharded", "modern"]]
    assert all(save["copied"] > 0 and save["communicated"] > 0 for save in stock)
    assert total < sum(save["bytes"] for save in stock)


def test_main_weights_of_bf16_survive_sharding(ranks, saved):
    arguments = {"load": str(saved("gradients", "bf16")), "override-opt-param-scheduler": True}
    world_size, made = of("parameters", "bf16", arguments)
    seen = ranks(world_size).run(train, made)[0]
    assert_same_training(seen, references(ranks)["bf16"], slice(HALFWAY, None), 1e-2)


@pytest.mark.parametrize(
    ("before", "after", "model"),
    [
        ("apart", "alike", "hybrid"),
        ("alike", "apart", "hybrid"),
        ("shared-out", "in-parts", "experts"),
        ("in-parts", "shared-out", "experts"),
        ("apart", "scanned", "mamba"),
        ("mixed", "pipeline", "latent"),
    ],
)
def test_other_models_go_on(ranks, saved, before, after, model):
    arguments = {"load": str(saved(before, model)), "override-opt-param-scheduler": True}
    world_size, made = of(after, model, arguments)
    seen = ranks(world_size).run(train, made)[0]
    assert_same_training(seen, references(ranks)[model], slice(HALFWAY, None))


def test_checkpoints_of_stock_megatron_go_on_under_a_plan(ranks, saved):
    """Of its optimizer without sharding, which in fp32 steps the weights themselves, and with it."""
    goes_on(ranks, saved, "stock", "mixed")
    goes_on(ranks, saved, "stock", "parameters")
    goes_on(ranks, saved, "stock-sharded", "pipeline")


def test_main_weights_of_stock_megatron_in_bf16_go_on_under_a_plan(ranks, saved):
    expected = references(ranks)["bf16"]
    arguments = {"load": str(saved("stock", "bf16")), "override-opt-param-scheduler": True}
    world_size, made = of("split", "bf16", arguments)
    seen = ranks(world_size).run(train, made)[0]
    assert_same_training(seen, expected, slice(HALFWAY, None), 1e-2, weights=False)
    # As far as weights of a plan that never stopped; without the main weights training would start anew.
    assert weight_difference(seen["weights"], expected["weights"]) < 2e-2


def test_stock_megatron_goes_on_from_a_plan(ranks, saved):
    goes_on(ranks, saved, "mixed", "stock-sharded")


def test_dropout_goes_on_where_it_stopped(ranks, tmp_path):
    """Under the same plan every rank draws the numbers that the job which never stopped draws."""
    dropped = {"hidden-dropout": 0.1, "attention-dropout": 0.1, "train-iters": 4}
    plan = ("tp2", ["tp1 recompute-full", "tp4+megatron", "tp2 zero1", "tp4+ulysses"])
    whole = {**dropped, "save": str(tmp_path), "save-interval": 2}
    never_stopped = ranks(4).run(train, case("dropped", "modern", *plan, arguments=whole))[0]
    resumed = {**dropped, "load": str(tmp_path), "ckpt-step": 2}
    seen = ranks(4).run(train, case("drawn-on", "modern", *plan, arguments=resumed))[0]
    assert seen["losses"] == never_stopped["losses"][2:]
    assert seen["norms"] == never_stopped["norms"][2:]
    assert all((seen["weights"][name] == value).all() for name, value in never_stopped["weights"].items())


def test_a_job_that_has_skipped_all_steps_so_far_goes_on(ranks, tmp_path):
    """fp16 looks for its loss scale first: no optimizer has made a step, or has states, by then."""
    steps = {"train-iters": 6, "lr-warmup-iters": 0}
    whole = {**steps, "save": str(tmp_path), "save-interval": 3}
    expected = ranks(1).run(train, case("sought", "fp16", "tp1", ["tp1"] * 4, arguments=whole))[0]
    assert expected["skipped"][:3] == [1, 1, 1] and expected["skipped"][-1] == 0
    resumed = {**steps, "load": str(tmp_path), "ckpt-step": 3, "override-opt-param-scheduler": True}
    made = case("found", "fp16", "tp1 zero2", ["tp1 zero2", "tp1", "tp1 zero3", "tp1"], arguments=resumed)
    seen = ranks(1).run(train, made)[0]
    assert seen["skipped"] == expected["skipped"][3:]
    assert relative(seen["losses"], expected["losses"][3:]) < 2e-3


def test_main_weights_of_bf16_survive(ranks, saved):
    """bf16 weights alone would lose 16 bits of the main weights; losses would then leave the first job's."""
    arguments = {"load": str(saved("mixed", "bf16")), "override-opt-param-scheduler": True}
    world_size, made = of("split", "bf16", arguments)
    seen = ranks(world_size).run(train, made)[0]
    expected = references(ranks)["bf16"]
    assert_same_training(seen, expected, slice(HALFWAY, None), 1e-2)


@pytest.mark.parametrize(("before", "after"), OTHER_WORLDS)
def test_goes_on_with_another_number_of_ranks(ranks, saved, before, after):
    goes_on(ranks, saved, before, after)
