"""What agents of several nodes hear of each other through the store that they share."""

import time

import pytest
import torch.distributed as dist

from megatron_patch.train import nodes
from megatron_patch.train.interface import interface_towards
from megatron_patch.train.nodes import Nodes
from megatron_patch.train.report import Verdict


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(nodes, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(nodes, "SILENT_SECONDS", 1.0)
    return dist.HashStore()


def test_a_fault_is_heard_on_every_other_node_and_its_teller_knows(store):
    three = [Nodes(store, number, 3, [number]) for number in range(3)]
    assert [node.fault() for node in three] == [None] * 3
    told = Verdict("rank 1: no", is_vague=True)
    three[1].tell(told, 10.0)
    assert three[1].is_known and [three[0].found, three[2].found] == [told, told]
    for node in three:
        node.close()


def test_a_silent_node_is_named_with_its_ranks_and_nobody_waits_for_it(store):
    ours, theirs = Nodes(store, 0, 2, [0, 1]), Nodes(store, 1, 2, [2, 3])
    time.sleep(0.2)
    assert ours.missing() == []
    theirs.close()
    time.sleep(1.6)
    (clause,) = ours.missing()
    assert clause.startswith("node 1 (ranks 2, 3) was not heard of for")
    began = time.monotonic()
    assert ours.fault(10.0) is None
    ours.tell(Verdict("rank 0: no"), 10.0)
    assert time.monotonic() - began < 5
    ours.close()


def test_a_single_node_waits_for_nobody(store):
    alone = Nodes(store, 0, 1, [0])
    began = time.monotonic()
    assert alone.fault(10.0) is None and alone.missing() == []
    alone.tell(Verdict("rank 0: no"), 10.0)
    assert time.monotonic() - began < 1


def test_the_interface_is_that_of_the_way_to_a_host():
    assert interface_towards("127.0.0.1") in ("lo", None)
    assert interface_towards("no.such.host.invalid") is None
