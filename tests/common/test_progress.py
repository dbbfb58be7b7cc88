"""Log messages and progress bars on stderr."""

import logging
import sys

import pytest

from pipeline.common.progress import LOG_FILE_INTERVAL, TqdmHandler, log_info, log_warning, logger, progress_bar

Capture = pytest.CaptureFixture[str]


def test_messages_are_printed_to_stderr_and_warnings_are_labeled(
    capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    log_info("100% of rows")
    log_warning("a row is damaged")
    assert capsys.readouterr() == ("", "100% of rows\nwarning: a row is damaged\n")
    assert [(record.name, record.levelname) for record in caplog.records] == [
        ("pipeline", "INFO"),
        ("pipeline", "WARNING"),
    ]


def test_messages_are_printed_once_if_the_root_logger_prints_them(capsys: Capture) -> None:
    handler = logging.StreamHandler()  # as logging.basicConfig() adds it
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    logging.getLogger().addHandler(handler)
    try:
        log_info("a message")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "INFO:pipeline:a message\n"


def test_level_of_the_logger_silences_info(capsys: Capture) -> None:
    logging.getLogger("pipeline").setLevel(logging.WARNING)
    try:
        log_info("a message")
        log_warning("a warning")
    finally:
        logger.setLevel(logging.INFO)
    assert capsys.readouterr().err == "warning: a warning\n"


def test_only_rank_0_logs(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    log_info("a message")
    log_warning("a warning")
    with progress_bar("encoding", 2, "images") as bar:
        bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_message_is_on_a_line_of_its_own_above_a_progress_bar(capsys: Capture) -> None:
    with progress_bar("encoding", 2, "images") as bar:
        bar.update(1)
        log_info("a message")
        bar.update(1)
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    assert "a message" in lines
    assert any(line.startswith("encoding: 100%") and "2/2" in line for line in lines)


def test_logger_has_one_handler() -> None:
    assert [type(handler) for handler in logger.handlers] == [TqdmHandler]


def test_progress_bar_is_redrawn_in_a_notebook_but_not_in_a_log_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress_bar("encoding", 2, "images") as bar:
        assert bar.mininterval == LOG_FILE_INTERVAL
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    with progress_bar("encoding", 2, "images") as bar:
        assert bar.mininterval < 1
