"""Which rank is to blame when several failed."""

import json
import os
import signal

import pytest

from megatron_patch.train.report import PIPE, Ending, Report, first_words, read_report, verdict, write_report

GONE = Report("lost contact with another rank", is_lost_contact=True)
BROKEN = Report("KeyError: 'x'", traceback="Traceback …")


@pytest.mark.parametrize(
    ("endings", "silent", "told"),
    [
        ([Ending(0, 1, GONE), Ending(1, -signal.SIGKILL)], {}, "rank 1 was killed by SIGKILL, as the kernel does"),
        ([Ending(0, 1, GONE), Ending(2, -signal.SIGSEGV)], {}, "rank 2 was killed by SIGSEGV"),
        ([Ending(0, -signal.SIGSEGV), Ending(2, -signal.SIGSEGV)], {}, "ranks 0, 2 were killed by SIGSEGV"),
        ([Ending(0, 1, GONE), Ending(3, 1, BROKEN)], {1: ""}, "rank 3: KeyError: 'x'"),
        ([Ending(2, 1, Report("no")), Ending(0, 1, Report("no"))], {}, "ranks 0, 2: no"),
        ([Ending(0, 1, Report("no")), Ending(1, 1, Report("yes"))], {}, "rank 0: no"),
        (
            [Ending(0, 1, GONE)],
            {1: ", at a.py line 3 in f"},
            "rank 1 did not answer, at a.py line 3 in f; rank 0: lost",
        ),
        (
            [Ending(0, -signal.SIGABRT)],
            {2: "", 1: ""},
            "rank 1 did not answer; rank 2 did not answer; rank 0 was killed",
        ),
        ([Ending(0, -signal.SIGABRT), Ending(1, 1, Report("no"))], {}, "rank 1: no"),
        ([Ending(4, 2)], {}, "rank 4 ended with status 2"),
    ],
)
def test_the_cause_is_told_and_not_its_consequences(endings, silent, told):
    for order in (endings, endings[::-1]):
        assert verdict(order, silent).sentence.startswith(told)


def test_only_a_defect_shows_a_traceback():
    assert verdict([Ending(0, 1, BROKEN)], {}).traceback == "Traceback …"
    assert verdict([Ending(0, 1, GONE), Ending(1, -9)], {}).traceback == ""


def test_a_report_arrives_whole_or_shortened_but_always_readable(monkeypatch):
    assert not write_report(BROKEN), "nobody listens"
    for report in (BROKEN, Report("…" * 40_000, traceback="é" * 90_000)):
        read, write = os.pipe()
        monkeypatch.setenv(PIPE, str(write))
        assert write_report(report)
        heard = read_report(os.read(read, 2**17))
        assert heard and report.text.startswith(heard.text) and report.traceback.endswith(heard.traceback)
        os.close(read)
        os.close(write)


def test_a_rank_without_a_word_has_no_report():
    assert read_report(b"") is None and read_report(json.dumps({}).encode()[:1]) is None


def test_an_errors_first_words_are_without_the_line_of_code_that_raised_it():
    assert first_words(RuntimeError("[/a/b.cc:78] Timed out waiting\nmore")) == "Timed out waiting"
    assert first_words(KeyError("x")) == "'x'" and first_words(MemoryError()) == ""
