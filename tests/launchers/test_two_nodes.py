"""ENV=dlc: the launcher on two nodes, each with its own address: to the end of a run, and until one is cut off."""

import re
import time

import pytest
from test_signals import training
from two_nodes import PATIENCE, TIMEOUT_MINUTES, side_by_side, start, two_nodes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The nodes, a run of three iterations and one without end; they start together: most is torch's import."""
    folder = tmp_path_factory.mktemp("nodes")
    arguments = ["dlc", *training(folder)[1:]]
    timeout = ["--distributed-timeout-minutes", str(TIMEOUT_MINUTES)]
    with two_nodes() as nodes:
        short = start(nodes, folder, "short", [*arguments, "--train-iters", "3"])
        endless = start(nodes, folder, "endless", [*arguments, *timeout, "--save", str(folder / "endless")])
        yield nodes, short, endless
        for command in (*short, *endless):
            command.process.kill()
            command.process.wait()


def test_a_run_of_two_nodes_trains_and_ends_with_status_0_on_both(runs):
    nodes, short, _ = runs
    statuses = [command.process.wait(PATIENCE) for command in short]
    output = side_by_side(nodes, short)
    assert statuses == [0, 0], output
    assert len(re.findall(r"^ iteration +[123]/ +3 ", short[0].output.read_text(), re.MULTILINE)) == 3, output
    assert "Traceback" not in output


def test_a_node_that_is_cut_off_is_named_within_the_timeout_on_the_other(runs):
    nodes, _, (first, second) = runs
    first.says(r"^ iteration +2/")
    nodes.cut(second.process)
    began = time.monotonic()
    status = first.process.wait(PATIENCE)
    seconds, output = time.monotonic() - began, side_by_side(nodes, [first, second])
    assert status == 1 and 60 * TIMEOUT_MINUTES <= seconds + 1 < 60 * TIMEOUT_MINUTES + 15, f"{seconds} s\n{output}"
    said = r"^megatron_patch.train: node 1 \(rank 1\) was not heard of for \d+ s; rank 0: lost contact with another"
    assert re.search(said, first.output.read_text(), re.MULTILINE) and "Traceback" not in output, output
    if nodes.kind == "two network namespaces":  # else it is stopped, and says nothing
        assert second.process.wait(PATIENCE) == 1
        assert "node 0 (rank 0) was not heard of for" in second.output.read_text(), side_by_side(nodes, [first, second])
