"""A failure of any rank is every rank's, of the same kind and with the same status."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from megallama.checkpoint.disk import CheckpointError, DamagedError
from megallama.comm.group import on_all_ranks
from megallama.config.errors import ConfigError, DataError, InternalError, LaunchError, MachineError, MegallamaError
from megallama.train.progress import TrainingStopped
from tests.threads import run_threads


class Particular(MegallamaError):
    """One whose constructor asks for more than a message."""

    def __init__(self, file: str, block: int) -> None:
        super().__init__(f"{file} in block {block}")


def outcome(failures: dict[int, Exception], size: int = 4, **more: Any) -> list[Any]:
    """What `on_all_ranks` does on every rank."""

    def body(group: Any) -> Any:
        def work() -> int:
            if group.rank in failures:
                raise failures[group.rank]
            return group.rank

        try:
            return on_all_ranks(group, "loading", work, **more)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            return error

    return run_threads(size, body)


def test_values_come_in_rank_order() -> None:
    assert outcome({}) == [[0, 1, 2, 3]] * 4
    assert outcome({}, collect=True)[0] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("failure", "status"),
    [(ConfigError("x"), 2), (DataError("x"), 2), (LaunchError("x"), 2), (TrainingStopped("x"), 3),
     (CheckpointError("x"), 2), (DamagedError("x"), 2), (MegallamaError("x"), 2)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_an_error_keeps_its_kind_and_status_on_every_rank(failure: MegallamaError, status: int) -> None:
    for error in outcome({2: failure}):
        assert (type(error), error.status, error.shared) == (type(failure), status, True)
        assert str(error).startswith("loading: rank 2 on ") and str(error).endswith(": x")


def test_a_status_of_its_own_and_a_constructor_of_its_own() -> None:
    failure = DataError("cut short")
    failure.status = 4
    assert {(type(error), error.status) for error in outcome({1: failure})} == {(DataError, 4)}
    for error in outcome({0: Particular("a.bin", 7)}):
        assert type(error) is Particular and str(error).endswith(": a.bin in block 7")


def test_damage_wins() -> None:
    for error in outcome({0: DataError("x"), 3: DamagedError("block 9"), 1: ValueError("y")}):
        assert type(error) is DamagedError
        assert "rank 3 on " in str(error) and "block 9 (and 2 more ranks: [0, 1])" in str(error)


def test_ranks_are_named_where_there_are_several_and_one_more_is_counted() -> None:
    for error in outcome({0: DataError("x"), 1: DataError("y")}, size=2):
        assert str(error).startswith("loading: rank 0 on ") and str(error).endswith(": x (and 1 more ranks: [1])")
    assert [str(error) for error in outcome({0: DataError("x")}, size=1)] == ["loading: x"]


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        (KeyError("no such key"), InternalError, "KeyError: 'no such key'"),
        (OSError(28, "No space left on device"), MachineError, "OSError: [Errno 28] No space left on device"),
    ],
)
def test_what_nobody_can_put_right_has_status_1_and_its_traceback_is_logged_first(
    failure: Exception, kind: type, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "megallama"):
        messages = outcome({1: failure})
    assert [(type(error), error.status) for error in messages] == [(kind, 1)] * 4 and str(messages[0]).endswith(text)
    (record,) = caplog.records
    assert record.exc_info is not None and record.exc_info[1] is failure
    caplog.clear()
    outcome({1: DataError("the user's")})
    assert not caplog.records
