"""How many threads have a core to themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.engine.llama.cores import FreeCores


def _told(running: int) -> str:
    return f"0.42 0.36 0.30 {running}/512 4711\n"


@contextmanager
def _free_cores(path: Path, cores: int, *then: int) -> Iterator[FreeCores]:
    """Reads `path`, in which another number of running threads stands after each pause, as long as there are some."""
    later = list(then)

    def pause(_: float) -> None:
        if later:
            path.write_text(_told(later.pop(0)))

    free = FreeCores(path, cores=cores, pause=pause)
    try:
        yield free
    finally:
        free.close()


@pytest.fixture
def load(tmp_path: Path) -> Path:
    return tmp_path / "loadavg"


def test_threads_that_have_a_core_each(load: Path) -> None:
    load.write_text(_told(1))
    with _free_cores(load, 4) as free:
        assert [free.count(wanted) for wanted in (1, 3, 4, 9)] == [1, 3, 4, 4]


def test_no_core_that_somebody_else_runs_on_is_free(load: Path) -> None:
    load.write_text(_told(3))
    with _free_cores(load, 4) as free:
        assert free.count(4) == 2


def test_one_who_is_about_to_leave_its_core_is_waited_for(load: Path) -> None:
    load.write_text(_told(3))
    with _free_cores(load, 2, 2, 1) as free:
        assert free.count(2) == 2


def test_one_who_stays_is_not_waited_for_for_ever(load: Path) -> None:
    load.write_text(_told(2))
    with _free_cores(load, 2, *[2] * 100) as free:
        assert free.count(2) == 1


@given(st.text(max_size=40) | st.integers(-9, 999).map(_told))
def test_whatever_the_file_says_there_is_the_callers_own(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("load") / "loadavg"
    path.write_text(text, encoding="utf-8")
    with _free_cores(path, 4) as free:
        assert 1 <= free.count(3) <= 3


def test_where_nobody_tells_no_other_core_is_free(tmp_path: Path) -> None:
    with _free_cores(tmp_path / "none", 8) as free:
        assert free.count(8) == 1


def test_a_closed_one_reads_no_more(load: Path) -> None:
    load.write_text(_told(1))
    free = FreeCores(load, cores=2)
    free.close()
    free.close()
    assert free.count(2) == 1


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="this system doesn't tell who runs")
def test_this_machine_tells() -> None:
    free = FreeCores()
    try:
        assert 1 <= free.count(2) <= min(2, os.cpu_count() or 1)
    finally:
        free.close()
