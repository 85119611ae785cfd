"""What people are told on stderr, and the exit codes."""

from __future__ import annotations

import io
import sys

import pytest

from relicctl import console as module
from relicctl.cli.options import print_result
from relicctl.console import Console, report_error
from relicctl.errors import DataError, Diverged, Interrupted, RelicError, RunFailed, UsageError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_stdout_holds_the_result_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.info("a note")
    console.warn("a warning")
    console.print_table(["name", "value"], [["kNN", 0.51234]])
    with console.progress(10) as progress:
        progress.update(1, {"loss": 2.0})
    report_error(UsageError("Wrong.", "Right it."))
    print_result("runs/demo")
    assert capsys.readouterr().out == "runs/demo\n"


def test_quiet_prints_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.info("a note")
    console.print_table(["name"], [["x"]])
    with console.progress(10) as progress:
        progress.update(1, {"loss": 2.0})
    console.warn("mind this")
    assert capsys.readouterr().err == "warning: mind this\n"


def test_table_columns_align(capsys: pytest.CaptureFixture[str]) -> None:
    Console().print_table(["accuracy", "n"], [["kNN(20)", 0.5], ["probe", 0.123456]])
    assert capsys.readouterr().err == "accuracy       n\nkNN(20)      0.5\nprobe     0.1235\n"


def test_progress_without_a_terminal_is_a_line_at_intervals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Console().progress(100) as progress:
        for step in range(1, 13):
            progress.update(step, {"loss": 1 / step, "data_wait": "0.1%"})
            now[0] += 1.0
    assert capsys.readouterr().err.splitlines() == [
        "step 1/100  loss 1  data_wait 0.1%",
        "step 6/100  loss 0.1667  data_wait 0.1%",
        "step 11/100  loss 0.09091  data_wait 0.1%",
        "step 12/100  loss 0.08333  data_wait 0.1%",
    ]


def test_a_progress_line_shows_the_metrics_of_its_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.5)
    with Console().progress(4) as progress:
        for step in range(1, 5):
            progress.update(step, {"loss": float(step)})
            progress.update(step, {"knn20": 0.5} if step == 3 else {})
    assert capsys.readouterr().err.splitlines() == [
        "step 1/4  loss 1",
        "step 3/4  loss 3",
        "step 3/4  knn20 0.5",
        "step 4/4  loss 4",
    ]


def test_steps_without_metrics_print_progress_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().progress(3) as progress:
        for step in range(1, 4):
            progress.update(step, {})
    assert capsys.readouterr().err.splitlines() == ["step 1/3", "step 3/3"]


def test_progress_lines_are_flushed_and_the_last_one_survives_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    class Log(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue())

    monkeypatch.setattr(sys, "stderr", Log())

    def run() -> None:
        with Console().progress(9) as progress:
            progress.update(1, {})
            progress.update(2, {})
            raise RunFailed("It broke.", "Mend it.")

    with pytest.raises(RunFailed):
        run()
    assert seen == ["step 1/9\n", "step 1/9\nstep 2/9\n"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Console().progress(10, 3) as progress:
        progress.update(10, {"loss": 2.5, "eta": "0:00:03"})
    text = terminal.getvalue()
    assert "10/10" in text
    assert "loss 2.5  eta 0:00:03" in text


def test_a_closed_stderr_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        Console().info("into the void")
        if stream is None:
            with Console().progress(3) as progress:
                progress.update(1, {})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunFailed("It broke.", "Mend it."), 1),
        (UsageError("It broke.", "Mend it."), 2),
        (DataError("It broke.", "Mend it."), 3),
        (Diverged("It broke.", "Mend it."), 4),
    ],
)
def test_expected_errors_are_two_sentences_and_their_exit_code(
    error: RelicError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_error(error) == code
    assert capsys.readouterr().err == "error: It broke.\n  fix: Mend it.\n"


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_a_stop_by_a_signal_is_no_error(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(Interrupted("It ended.", "Resume it.", number)) == code
    assert capsys.readouterr().err == "stopped: It ended.\n  Resume it.\n"


def test_unexpected_errors_mention_debug(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("first line\nsecond line")
    assert report_error(error) == 1
    assert capsys.readouterr().err == (
        "error: Unexpected ValueError: first line.\n  fix: --debug shows the traceback.\n"
    )


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="inside") as raised:
        int("inside")
    assert report_error(raised.value, debug=True) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    assert said.endswith("  fix: The traceback is above.\n")


def test_ctrl_c_is_reported_with_exit_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.startswith("stopped: SIGINT before")


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, which is told by its name."""


def test_a_failing_compiler_is_reported_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    missing = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    assert report_error(missing("No working C++ compiler found\nand more")) == 1
    assert capsys.readouterr().err == (
        "error: The networks cannot be compiled here: No working C++ compiler found.\n"
        "  fix: Set runtime.compile=false.\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_names_what_to_change(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(error) == 1
    said = capsys.readouterr().err
    assert "Out of memory" in said
    for key in ("optim.batch_size", "views.large", "runtime.activation_checkpointing", "runtime.precision"):
        assert key in said
