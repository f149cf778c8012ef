"""Disks that fail and processes that are killed, at every call: no corrupt checkpoint is ever accepted.

`make faults` runs the same scripts, with more kills and with kills at random moments.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from faults import saves

FAULTS = Path(__file__).with_name("faults")


def run(script, folder, *arguments):
    command = [sys.executable, str(FAULTS / script), str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [scenario.name for scenario in saves.SCENARIOS])
def test_every_call_of_every_save_fails_or_is_the_last(tmp_path, name):
    """ENOSPC and EIO, once, from there on, and after half a write; SIGKILL before each call and in each write."""
    (report,) = run("saves.py", tmp_path, name).values()
    calls = set(report["calls"])
    assert calls >= {"open", "write", "chmod", "fsync", "rename"}, calls
    # The safetensors library's way; torch's sharded files are written by Python.
    assert ("truncate" in calls) == (name != "inq.save_sharded"), calls
    assert report["faults"] == 6 * len(report["calls"])
    # The name of the new one is on the disk when the save says that it is done.
    at = len(report["calls"]) - report["calls"][::-1].index("rename")
    assert "fsync" in report["calls"][at:], report["calls"]
    # Both sides of the moment at which the new checkpoint takes the old one's place.
    assert report["old"] > 20, report
    assert report["new"] > 4, report
    if name not in ("inq.save, a file", "inq.save_training"):
        assert calls >= {"mkdir", "unlink"}, calls


def test_two_hundred_kills(tmp_path):
    """SIGKILL at 200 different calls of a training run that saves after every step: the same hash as without."""
    report = run("lives.py", tmp_path, "200")
    assert report["kills"] >= 200
    assert report["points"] >= 200
    assert report["left"] > 0  # some were killed while a file was being written
    assert set(report["killed"]) == {report["whole"]}
