"""Several ranks on one machine (gloo): the same model as on one, and runs that change hands."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dpar_core.models.dpar import DPAR
from dpar_core.training import parallel
from dpar_core.training.loop import TrainingRun, TrainingStopped
from dpar_core.training.parallel import Ranks
from tests.helpers import training_fixtures as tiny
from tests.helpers.processes import fork_server

QUIET = replace(tiny.DPAR_CONFIG, dropout=0.0, class_dropout=0.0)


class Poisoned(tiny.DPARObjective):
    """From its 8th step on, one rank alone has a loss that is not a number."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls = rank, 0

    def loss(self, model, batch):
        self.calls += torch.is_grad_enabled()
        return super().loss(model, batch) * (float("nan") if self.calls >= 8 and self.rank == 1 else 1.0)


def run(root: Path, ranks: Ranks, *, poisoned: bool = False, crash_after: int | None = None, **changes):
    settings = tiny.tiny_settings(**changes)
    torch.manual_seed(0)
    data = tiny.TinyData(settings, ranks, patches=True)
    objective = Poisoned(ranks.rank) if poisoned else tiny.DPARObjective()
    store = tiny.tiny_store(root, "dpar")
    return TrainingRun(DPAR(QUIET), objective, data, settings, store, hooks=tiny.Recorder(crash_after), ranks=ranks).run()


SCENARIOS = {
    "ddp": {"accumulate": 2},
    "fsdp": {"strategy": "fsdp", "accumulate": 2},
    "hybrid": {"strategy": "fsdp", "accumulate": 2},
    "broken ddp": {"crash_after": 7},
    "broken fsdp": {"strategy": "fsdp", "crash_after": 7},
    "begun alone": {"strategy": "fsdp"},
    "bad ddp": {"poisoned": True},
    "bad fsdp": {"strategy": "fsdp", "poisoned": True},
}


def worker(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    real = parallel.mesh_shape
    for name, changes in SCENARIOS.items():
        parallel.mesh_shape = real if name != "hybrid" else lambda ranks: (2, 1)
        try:
            run(folder / name, Ranks(rank, world), **changes)
        except TrainingStopped as stopped:
            (folder / f"{name}-{rank}").write_text(str(stopped))
        except KeyboardInterrupt:
            pass
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """What two processes made of every scenario."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("together")
    with pytest.raises(KeyboardInterrupt):
        run(folder / "begun alone", Ranks(), crash_after=7)
    fork_server()
    mp.start_processes(worker, (2, folder), nprocs=2, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("alone")
    run(root, Ranks())
    return root


def weights(root: Path) -> dict[str, torch.Tensor]:
    return tiny.tiny_store(root, "dpar").newest().model()


def furthest(one, other) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hybrid"])
def test_two_ranks_train_the_model_that_one_would(alone, together, strategy):
    """Gradients are summed in another order, and Adam divides by small numbers: 1e-3 of weights of size 0.02 to 1."""
    assert furthest(weights(together / strategy), weights(alone)) < 1e-3
    one, two = (tiny.tiny_store(place, "dpar").newest() for place in (alone, together / strategy))
    assert one.optimizer().keys() == two.optimizer().keys()
    for mine, theirs in zip(one.state["progress"]["curve"], two.state["progress"]["curve"]):
        assert mine == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_ranks(alone, together, tmp_path, strategy):
    shutil.copytree(together / f"broken {strategy}", tmp_path / "run")
    assert tiny.tiny_store(tmp_path / "run", "dpar").steps() == [5]
    run(tmp_path / "run", Ranks())
    assert furthest(weights(tmp_path / "run"), weights(alone)) < 1e-3


def test_a_run_of_one_rank_goes_on_sharded(alone, together):
    assert furthest(weights(together / "begun alone"), weights(alone)) < 1e-3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_bad_loss_of_one_rank_stops_all_before_the_update(together, strategy):
    sentences = {(together / f"bad {strategy}-{rank}").read_text() for rank in (0, 1)}
    assert len(sentences) == 1 and "stopped at step 8, before its update" in sentences.pop()
    assert tiny.tiny_store(together / f"bad {strategy}", "dpar").newest().step == 5


def test_shards_stay_within_a_node_and_nodes_hold_copies():
    assert parallel.shape_of_nodes(["a"] * 4 + ["b"] * 4) == (2, 4)
    for nodes in (["a"] * 4, ["a", "b", "c"], ["a", "a", "b"], ["a", "b", "a", "b"], ["a"]):
        assert parallel.shape_of_nodes(nodes) == (len(nodes),)


def test_sharded_blocks_are_those_of_the_model():
    blocks = parallel.transformer_blocks(DPAR(tiny.DPAR_CONFIG))
    assert len(blocks) == tiny.DPAR_CONFIG.layers and {type(block).__name__ for block in blocks} == {"Block"}


def test_weights_of_another_model_are_refused():
    model = DPAR(tiny.DPAR_CONFIG)
    state = parallel.full_model(model)
    with pytest.raises(ValueError, match="2 names differ"):
        parallel.load_model(model, {("x" + name if name == "norm.weight" else name): t for name, t in state.items()})
    with pytest.raises(ValueError, match=r"norm.weight is \(32,\) here and \(31,\)"):
        parallel.load_model(model, state | {"norm.weight": torch.ones(31)})
