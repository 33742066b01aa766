"""The short form of benchmarks/kill.py, which kills during a save, during an evaluation, in start-up and anywhere."""

from pathlib import Path

from benchmarks import kill


def test_killed_and_started_again_the_run_ends_in_the_same_bits(tmp_path: Path):
    hit, found = kill.run(tmp_path, kills=2, steps=200)
    assert not found
    assert hit["steps"] + hit["an evaluation"] == 2
