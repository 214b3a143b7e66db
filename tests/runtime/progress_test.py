import io
import os
import signal
import threading

import pytest

from bdlm_jax.runtime.progress import StopSignal, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_gets_lines_and_a_short_loop_none():
    stream = io.StringIO()
    assert list(progress(range(3), description="epoch", stream=stream)) == [0, 1, 2]
    assert stream.getvalue() == ""
    bar = progress(range(3), description="epoch", stream=stream, every_s=0.0)
    for _ in bar:
        bar.set_postfix(loss=0.25)
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch: 1/3 (33%)", "epoch: 2/3 (67%)", "epoch: 3/3 (100%)"]
    assert lines[-1].endswith("loss 0.25")


def test_counting_by_hand_from_where_a_resumed_run_stands():
    stream = io.StringIO()
    with progress(description="steps", total=10, start=6, stream=stream, every_s=0.0) as bar:
        bar.update(2)
    assert stream.getvalue().startswith("steps: 8/10 (80%)")


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    assert list(progress(range(3), description="epoch", stream=stream)) == [0, 1, 2]
    assert "\r" in stream.getvalue()
    assert "3/3" in stream.getvalue()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request_and_the_second_acts(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(number))
    try:
        with StopSignal() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            assert seen == []
            os.kill(os.getpid(), number)
            assert seen == [number]
        with StopSignal() as stop:
            pass
        os.kill(os.getpid(), number)
        assert not stop.requested
        assert seen == [number, number]
    finally:
        signal.signal(number, before)


def test_outside_the_main_thread_nothing_is_watched():
    errors = []

    def work():
        try:
            with StopSignal() as stop:
                errors.append(stop.requested)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == [False]
