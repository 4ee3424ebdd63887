"""What a rank says when it fails, and which rank's words are the cause when several failed."""

import json
import os
import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

PIPE = "MP_REPORT_FD"  # in a rank's environment: where its agent listens
LONGEST, LONGEST_TRACEBACK = 3_000, 10_000  # characters: together less than the 64 KiB that a pipe holds
KILLED, FAILED, ABORTED, LOST_CONTACT = range(4)  # what is more likely the cause comes first


@dataclass(frozen=True)
class Report:
    """One sentence; whether it is only that a rank could not be reached; the traceback of what we never expect."""

    text: str
    is_lost_contact: bool = False
    traceback: str = ""


@dataclass(frozen=True)
class Ending:
    """How a rank ended: `status` as subprocess has it, negative where a signal killed it."""

    rank: int
    status: int
    report: Report | None = None


def first_words(error: BaseException) -> str:
    """The first line of an error's text, without the line of C++ that raised it."""
    return re.sub(r"^\[[^]]*\] (err == 0\. )?", "", next((line for line in str(error).splitlines() if line), ""))


@dataclass(frozen=True)
class Verdict:
    """The sentence that names the rank to blame, with a traceback where it is a defect of ours. `is_vague`: no rank
    is named, only who missed one."""

    sentence: str
    traceback: str = ""
    is_vague: bool = False


def write_report(report: Report) -> bool:
    """Tell the agent; False where there is none."""
    if PIPE not in os.environ:
        return False
    short = Report(report.text[:LONGEST], report.is_lost_contact, report.traceback[-LONGEST_TRACEBACK:])
    os.write(int(os.environ[PIPE]), json.dumps(asdict(short), ensure_ascii=False).encode("utf-8", "replace"))
    return True


def read_report(data: bytes) -> Report | None:
    """What `write_report` wrote; None where a rank ended without a word."""
    try:
        return Report(**json.loads(data))
    except ValueError:
        return None


def verdict(endings: Iterable[Ending], silent: Mapping[int, str]) -> Verdict:
    """Who is to blame, by how the failed ranks of a node ended.

    `silent`: ranks that still ran when others had given up waiting, with the place in the code where they were.
    """
    endings = sorted(endings, key=lambda ending: (_blame(ending), ending.rank))
    cause = endings[0]
    ranks = [ending.rank for ending in endings if _words(ending) == _words(cause)]
    said = f"{numbered(ranks)}{_words(cause, many=len(ranks) > 1)}"
    is_consequence = _blame(cause) >= ABORTED
    if is_consequence and silent:
        said = f"{unanswered(silent)}; {said}"
    return Verdict(said, cause.report.traceback if cause.report else "", is_consequence and not silent)


def unanswered(silent: Mapping[int, str]) -> str:
    """The ranks that others waited for, and where in the code they are."""
    return "; ".join(f"rank {rank} did not answer{place}" for rank, place in sorted(silent.items()))


def _blame(ending: Ending) -> int:
    if ending.report is not None:
        return LOST_CONTACT if ending.report.is_lost_contact else FAILED
    if ending.status == -signal.SIGABRT:  # the end of a rank whose communication library gave up waiting
        return ABORTED
    return KILLED if ending.status < 0 else FAILED


def _words(ending: Ending, *, many: bool = False) -> str:
    if ending.report is not None:
        return f": {ending.report.text}"
    if ending.status >= 0:
        return f" ended with status {ending.status}"
    hint = ", as the kernel does when memory runs out" if ending.status == -signal.SIGKILL else ""
    return f" {'were' if many else 'was'} killed by {signal.Signals(-ending.status).name}{hint}"


def numbered(ranks: list[int]) -> str:
    """`rank 1`, or `ranks 0, 2`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, sorted(ranks)))}"
