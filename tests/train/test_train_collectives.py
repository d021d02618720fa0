"""What processes tell each other, in one alone; two are in test_train_processes.py."""

from types import SimpleNamespace

import pytest
import torch

from clearwing.train.collectives import agreement, gathered, one_fails_all_stop, share, summed, whole_logits
from clearwing.train.devices import make_fabric
from clearwing.types import ClearwingError


def test_only_what_a_collective_raises_is_a_lost_process():
    group, alone = SimpleNamespace(world_size=2, global_rank=1), SimpleNamespace(world_size=1, global_rank=0)
    with pytest.raises(RuntimeError, match="shapes differ"), one_fails_all_stop(group):
        raise RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="gloo: "), one_fails_all_stop(alone):
        raise RuntimeError("gloo: Connection closed by peer")
    with pytest.raises(ClearwingError, match="rank 1 lost the others") as found, one_fails_all_stop(group):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:545] Connection closed by peer")
    assert found.value.exit_code == 1


def test_alone_everything_is_the_whole():
    fabric = make_fabric("cpu", "float32")
    assert fabric.world_size == 1
    with one_fails_all_stop(fabric):
        assert summed(fabric, 0.1, torch.tensor(2)) == [0.1, 2]
        assert agreement(fabric)([True, 0.1]) == [1, 0.1]
        rows = torch.rand(3, 2)
        assert whole_logits(fabric, rows, 3, 2) is rows
    with pytest.raises(ClearwingError, match="the share of rank 0"):
        gathered(fabric, rows, 4)


@pytest.mark.parametrize("n", [0, 1, 5, 12])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_shares_are_contiguous_even_and_all(n, world):
    parts = [share(n, rank, world) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
