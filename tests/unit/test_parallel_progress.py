"""Which rank holds up a task, by what was seen of all of them; and tasks of one process."""

import pytest

from megatron_patch.checkpoint.paced import PacedFile
from megatron_patch.parallel.progress import Note, Progress, Sight, hung

PATIENCE, TASK = 20, 3


def sight(still: int, silent: int = 0, doing: str | None = None, number: int = TASK, is_over: bool = False) -> Sight:
    return Sight(Note(number, 5, 5, doing, is_over), still, silent)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (sight(19, doing="writing x"), ""),
        (sight(20, doing="writing x"), "rank 1 got no further in writing x"),
        (sight(20, 15, doing="writing x"), "rank 1 was not heard of, last writing x"),
        (sight(50, 19), "all ranks waited for each other"),
        (sight(20, 20), "rank 1 was not heard of, last waiting for the others"),
        (sight(20, 20, number=2, is_over=True), "rank 1 did not begin it"),
        (sight(19, 19, number=2, is_over=True), ""),
        (sight(4, doing=None), ""),
    ],
)
def test_a_rank_hangs_when_neither_its_work_nor_the_task_goes_on(other, told):
    assert hung([sight(50), other], TASK, PATIENCE) == told


def test_a_rank_that_has_finished_holds_nobody_up():
    for done in (sight(50, 50, is_over=True), sight(50, 50, number=TASK + 1)):
        assert hung([sight(3), done], TASK, PATIENCE) == ""


def test_a_note_that_only_beats_is_alive_and_still():
    seen = Sight(Note(1, 1, 1, None, False))
    seen.look(Note(1, 2, 1, None, False))
    assert (seen.still, seen.silent) == (1, 0)
    seen.look(Note(1, 2, 1, None, False))
    assert (seen.still, seen.silent) == (2, 1)
    seen.look(Note(1, 3, 2, "writing", False))
    assert (seen.still, seen.silent) == (0, 0)


def test_what_ends_a_task_is_raised_where_it_is_waited_for():
    def fail() -> None:
        raise KeyError("x")

    progress = Progress()
    progress.start("a task", fail)
    with pytest.raises(KeyError, match="x"):
        progress.wait()
    progress.wait()  # nothing is left of it
    assert progress.together("counting", lambda: 2) == [2]


def test_a_file_is_written_in_steps_and_each_is_heard_of(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_patch.checkpoint.paced.STEP_BYTES", 10)
    heard = []
    with PacedFile(tmp_path / "file", lambda: heard.append((tmp_path / "file").stat().st_size)) as file:
        assert file.write(memoryview(bytes(range(24))).cast("I")) == 24
        assert file.write(b"end") == 3
    assert heard == [10, 20, 24, 27]
    assert (tmp_path / "file").read_bytes() == bytes(range(24)) + b"end"
