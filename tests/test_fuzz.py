"""Damaged and hostile files: every reader returns or refuses them in one line. `fuzz_readers` tries many more."""

import pytest
from fuzz_cases import CASES, ODD
from fuzz_readers import attempt, damaged, main, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EDITS = st.lists(
    st.tuples(st.integers(0, 10), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32 - 1)), min_size=1, max_size=4
)
QUICKLY = settings(
    max_examples=20,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numbers that are too large for float32
@pytest.mark.parametrize("name", CASES)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path):
    case = CASES[name]
    write(case, tmp_path)
    case.read(tmp_path)

    @QUICKLY
    @given(st.sampled_from(sorted(case.files)), EDITS)
    def check(file, edits):
        attempt(case, tmp_path, file, damaged(case.files[file], edits, case.words))
        (tmp_path / file).write_bytes(case.files[file])

    check()


def test_every_odd_value_is_tried_in_every_place_of_a_config(tmp_path):
    """Of the file's own edits, those that replace a value by another of JSON."""
    case = CASES["UNet's config"]
    contents = case.files["config.json"]
    ends = {
        attempt(case, tmp_path, "config.json", damaged(contents, [(8, place / 40, what)]))
        for place in range(40)
        for what in range(len(ODD))
    }
    assert ends == {"read", "refused"}


@pytest.mark.slow
def test_the_program_finds_what_a_reader_must_not_do(capfd, monkeypatch):
    """A reader that raises, one that crashes, one that takes the memory, and one that takes the time."""
    import ctypes

    def crash(folder):
        if b"cat" not in (folder / "a.txt").read_bytes():
            ctypes.string_at(0)

    def grow(folder):
        if b"cat" not in (folder / "a.txt").read_bytes():
            bytearray(2**32)

    def wait(folder):
        while b"cat" not in (folder / "a.txt").read_bytes():
            pass

    def fail(folder):
        if b"cat" not in (folder / "a.txt").read_bytes():
            raise KeyError("cat")

    for name, read in (("crash", crash), ("grow", grow), ("wait", wait), ("fail", fail)):
        monkeypatch.setitem(CASES, name, CASES["prompts.txt"]._replace(read=read))
        assert main(4, 3, [name]) > 0
    told = capfd.readouterr().out
    assert "crash: the process died" in told
    assert "MemoryError" in told
    assert "Slow: more than 5 s" in told
    assert "KeyError: 'cat'" in told
