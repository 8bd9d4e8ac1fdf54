"""A run that is killed with SIGKILL and started again ends with the same bytes."""

import pytest
from job import CNN, contents, life, run

from ncmethods.training import ModelConfig

AUGMENTED = {"mixup": 0.3, "crop": 1, "flip": True}
DROPOUT = ModelConfig("job:dropout_net", 1, 4, "etf_head")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Bytes of unbroken runs, made once for each set of options."""
    made = {}

    def get(**options):
        key = repr(options)
        if key not in made:
            out = tmp_path_factory.mktemp("unbroken")
            run(out, **options)
            made[key] = contents(out)
        return made[key]

    return get


def litter(out):
    return [p.name for p in out.rglob("*") if ".tmp" in p.name]


@pytest.mark.parametrize("step", [1, 2, 5, 6, 11, 12])  # 3 steps an epoch, checkpoints every 2
@pytest.mark.parametrize("options", [{"model": CNN, **AUGMENTED}, {"model": DROPOUT}])
def test_killed_at_a_step(tmp_path, unbroken, options, step):
    assert not life(tmp_path, "step", step, **options)
    assert life(tmp_path, **options)
    assert contents(tmp_path) == unbroken(**options)


def test_killed_in_every_way_in_one_directory(tmp_path, unbroken):
    """Torn writes, before and after renames, torn lines, while the report is drawn."""
    options = {"model": CNN, **AUGMENTED, "checkpoint_steps": 1}
    ways = [(m, n) for n in (1, 2, 3) for m in ("write", "replace", "replaced", "line")]
    died = [way for way in [*ways, ("draw", 1)] if not life(tmp_path, *way, **options)]
    assert died[-1] == ("draw", 1), "the run ended before its report was drawn"
    assert len(died) >= 10
    assert life(tmp_path, **options)
    assert contents(tmp_path) == unbroken(**options)
    assert not litter(tmp_path)
    assert len(list(tmp_path.glob("checkpoint-*.pt"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["write", "replace", "replaced", "line", "step"])
def test_killed_at_every_single_event(tmp_path, unbroken, moment):
    options = {"model": CNN, **AUGMENTED}
    n = 0
    while True:
        n += 1
        out = tmp_path / str(n)
        if life(out, moment, n, **options):
            break  # fewer than n such events in a whole run
        assert life(out, **options)
        assert contents(out) == unbroken(**options), (moment, n)
        assert not litter(out)
    assert n > 4


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_by_the_process_group(tmp_path, world):
    from kill import torture

    found = torture(
        10, world, options=["--train.checkpoint-steps", "3"], seed=1, longest=0.8, where=tmp_path
    )
    assert all(found["identical"].values()), found
    assert not found["litter"]
    assert found["kills in training"] == 10
