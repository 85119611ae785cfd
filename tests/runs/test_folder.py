"""A run's folder: what is removed when it is opened."""

from __future__ import annotations

from pathlib import Path

from relicctl.runs.folder import RunFolder


def test_opening_removes_leftovers_of_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", overwrite=False, keep=1)
    run.write_text(run.config_path, "command: pretrain\n")
    run.close()
    for name in (".config.yaml.1.tmp", ".results.json.1.tmp", ".status.json.1.tmp", ".tmpA1b2"):
        (run.path / name).write_text("half")
    (run.path / ".encoder.onnx.1.tmp").write_text("an export that is being written")
    (run.path / ".r50-timm.1.tmp").mkdir()  # one that was killed
    RunFolder.reopen(run.path, keep=1).close()
    left = {path.name for path in run.path.iterdir()}
    assert left == {".lock", "config.yaml", ".encoder.onnx.1.tmp", ".r50-timm.1.tmp"}
