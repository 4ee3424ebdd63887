"""The doctor beside machines that lack something, and once on this one."""

import json
from types import SimpleNamespace

import pytest

from megatron_patch.doctor import __main__ as doctor
from megatron_patch.doctor import collectives as of_collectives
from megatron_patch.doctor import host as of_host
from megatron_patch.doctor.collectives import all_reduce
from megatron_patch.doctor.finding import Finding, looked_at
from megatron_patch.doctor.host import disk, host
from megatron_patch.doctor.versions import _package, requirements


def test_two_ranks_add_up_a_tensor(tmp_path):
    assert all_reduce("gloo", tmp_path) is None


def test_ranks_that_cannot_talk_are_told_with_their_last_word(tmp_path, monkeypatch):
    monkeypatch.setattr(of_collectives, "RANK", "raise OSError('no such interface')")
    assert all_reduce("gloo", tmp_path) == "; ".join(f"rank {n}: OSError: no such interface" for n in range(2))
    monkeypatch.setattr(of_collectives, "RANK", "import time; time.sleep(60)")
    monkeypatch.setattr(of_collectives, "SECONDS", 0.2)
    assert all_reduce("gloo", tmp_path) == "no answer within 0.2 s"


def test_findings_are_no_failure_and_json_has_every_section(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "collectives", lambda: iter([Finding("collectives", "gloo", "silent", "one rank only")])
    )
    assert doctor.main([str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    sections = {row["section"] for row in told["findings"]}
    assert sections == {"versions", "devices", "attention", "fp8", "collectives", "host", "disk", "limits"}
    assert {
        "section": "collectives",
        "name": "gloo",
        "found": "silent",
        "cost": "one rank only",
        "state": "lacks",
    } in told["findings"]
    assert told["lacking"] == sum(row["state"] == "lacks" for row in told["findings"])
    assert not any(tmp_path.iterdir())


def test_a_directory_that_is_not_there_is_an_error_of_the_users(tmp_path, capsys):
    assert doctor.main([str(tmp_path / "no")]) == 2
    assert "is no directory" in capsys.readouterr().err


def test_the_table_names_what_is_lacking_and_what_it_costs():
    text = doctor.table([Finding("disk", "free", "1 GiB", "too little"), Finding("disk", "writing", "fast")])
    assert "lacks  free" in text and "→ too little" in text and "ok     writing" in text
    assert text.endswith("2 things were looked at, 1 are lacking")


@pytest.mark.parametrize(
    ("line", "found", "cost"),
    [
        ("no-such-package>=1", "not installed (asked: >=1)", "what needs it does not run"),
        ("no-such-package>=1; python_version < '3'", "not installed (asked: >=1)", ""),
        ("torch<2", "asked: <2", "no test was run with this version"),
        ("torch>=2", "asked: >=2", ""),
    ],
)
def test_a_package_is_compared_with_what_is_asked_for(line, found, cost):
    finding = _package(line)
    assert found in finding.found
    assert finding.cost.startswith(cost) and bool(finding.cost) == bool(cost)


def test_every_requirement_is_looked_at():
    assert {"torch>=2.11,<=2.13.0", "pytest>=8.4,<10"} <= set(requirements())


def test_a_small_shared_memory_and_a_full_disk_have_their_price(tmp_path, monkeypatch):
    (tmp_path / "dev" / "shm").mkdir(parents=True)
    tiny = SimpleNamespace(total=64 * 2**20, used=0, free=2**20)
    monkeypatch.setattr(of_host.shutil, "disk_usage", lambda path: tiny)
    costs = {finding.name: finding.cost for finding in [*host(tmp_path), *disk(tmp_path)]}
    assert "--shm-size" in costs["/dev/shm"]
    assert "another directory" in costs[f"free in {tmp_path}"]
    assert "unknown" in costs["writing"] and costs["memory available"]


def test_a_look_that_fails_does_not_end_the_others():
    def fails():
        yield Finding("devices", "cuda 0", "here")
        raise RuntimeError("driver too old\nsecond line")

    first, second = looked_at("devices", fails)
    assert first.state == "ok" and second.found == "RuntimeError: driver too old" and second.state == "lacks"
