"""A bar on a terminal, lines in a log."""

import io
import logging
import sys

import pytest

from tempolora import progress as module
from tempolora.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "tempolora")
    return caplog


def test_a_log_gets_whole_lines_with_how_far_it_is_and_the_loss(said, monkeypatch, capfd):
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    with progress(what="high", total=4, initial=1, unit="step") as bar:
        for _ in range(3):
            bar.set_postfix(loss="0.5", refresh=False)
            bar.update()
    assert said.messages[0].startswith("high: 1 of 4, 00:00 gone")
    assert said.messages[-1].startswith("high: 4 of 4, ")
    assert said.messages[-1].endswith(" to go, loss=0.5")
    assert not any(set("\r\n\x1b") & set(message) for message in said.messages)
    assert capfd.readouterr() == ("", "")


def test_two_at_once_are_lines_of_their_own(said, monkeypatch):
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    with progress(what="outer", total=1) as outer:
        assert list(progress(range(2), what="inner")) == [0, 1]
        outer.update()
    assert {message.split(":")[0] for message in said.messages} == {"outer", "inner"}
    assert not any("\x1b" in message for message in said.messages)


def test_what_takes_less_than_a_minute_leaves_no_line(said, capfd):
    assert list(progress(range(5), what="sampling")) == [0, 1, 2, 3, 4]
    assert not said.messages
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_the_log_nothing(said, monkeypatch):
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress(range(3), what="clips", unit="clip")) == [0, 1, 2]
    assert "clips: 100%" in sys.stderr.getvalue()
    assert not said.messages


def test_hidden_work_is_told_by_another_process(said, monkeypatch):
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    bar = progress(what="high", total=2, hidden=True)
    bar.update()
    bar.close()
    assert not said.messages
