"""A few hundred damaged files: every reader answers or refuses in words, within its budget."""

from tests import fuzz, fuzz_targets

CASES = 10


def test_damaged_files_are_read_or_refused():
    """benchmarks/fuzz.py runs thousands of these."""
    wrong = {}
    with fuzz.Worker() as worker:
        for target in (*fuzz_targets.PARAMETERS, *fuzz_targets.ANNOTATIONS, "index.csv", *fuzz_targets.IMAGES):
            assert worker.run(target, -1).kind == "answer", f"{target} is not sound: its damage proves nothing"
            verdicts = {case: worker.run(target, case) for case in range(CASES)}
            wrong |= {(target, case): v for case, v in verdicts.items() if v.kind not in ("answer", "refusal")}
            assert any(v.kind == "refusal" for v in verdicts.values()), f"no damage to {target} was noticed"
    assert not wrong


def test_the_worker_finds_what_is_wrong(monkeypatch):
    """A fuzzer that finds nothing must be able to find something."""
    monkeypatch.setattr(fuzz, "SPARE", 10 << 20)

    def raises(folder):
        raise KeyError("x")

    def allocates(folder):
        return b"x" * (64 << 20) and None

    def answers(folder):
        return None if (folder / "x").read_bytes() == b"content" else "another file"

    kinds = {read.__name__: fuzz.judge({"x": b"content"}, read).kind for read in (raises, allocates, answers)}
    assert kinds == {"raises": "traceback", "allocates": "memory", "answers": "answer"}
