"""A failed write in any stage: the error names the remedy, no partial file is left, and a rerun succeeds.

Writes are counted: files opened for writing, folders created, renames, and the writes of torch and safetensors.
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
from processes import Mounts, pipe
from runs import files_of, with_train
from safetensors import SafetensorError

import pipeline.training.lora_monitor
from pipeline.commands.evaluate import evaluate
from pipeline.commands.export import export
from pipeline.commands.grid import BaseModelCache
from pipeline.commands.report import report
from pipeline.commands.train import load_for_training, train_run
from pipeline.common.errors import PipelineError
from pipeline.common.files import WriteError, append_line, put_in_place, replacing_folder, require_writable, write_text
from pipeline.config import Config
from pipeline.runs.run import Run

NUMBERS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO]
SOME, MANY = 5, 20


class Disk:
    """Counts the writes below `folder` and fails them from number `refused` on."""

    def __init__(self, folder: Path, refused: int = 0) -> None:
        self.folder, self.refused, self.writes = str(folder), refused, 0

    def take(self, path: object, half: Callable[[], object] = lambda: None) -> None:
        if not str(path).startswith(self.folder):
            return
        self.writes += 1
        if self.refused and self.writes >= self.refused:
            half()
            number = NUMBERS[self.refused % len(NUMBERS)]
            raise OSError(number, os.strerror(number), str(path))


_disk: Disk | None = None


def _watch(event: str, words: tuple[Any, ...]) -> None:
    """Audit hook; Python cannot remove it."""
    if _disk is None:
        return
    if event == "open" and isinstance(words[0], str | Path):
        writes = set(words[1] or "") & set("wax+") or words[2] & (os.O_WRONLY | os.O_RDWR)
        _ = writes and _disk.take(words[0])
    elif event in ("os.mkdir", "os.rename"):
        _disk.take(words[0])


sys.addaudithook(_watch)


def _half_written(path: object) -> Callable[[], object]:
    return lambda: Path(str(path)).write_bytes(b"half of it")


def _torch_save(save: Callable[..., object]) -> Callable[..., object]:
    def saving(values: object, path: Any, *how: Any, **more: Any) -> object:
        if _disk:
            try:
                _disk.take(path, _half_written(path))
            except OSError:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534") from None
        return save(values, path, *how, **more)

    return saving


def _safetensors_save(save: Callable[..., object]) -> Callable[..., object]:
    def saving(tensors: object, path: Any, *how: Any, **more: Any) -> object:
        if _disk:
            try:
                _disk.take(path, _half_written(path))
            except OSError as error:
                message = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise SafetensorError(message) from None
        return save(tensors, path, *how, **more)

    return saving


def _pwrite(write: Callable[[int, Any, int], int]) -> Callable[[int, Any, int], int]:
    def writing(descriptor: int, data: Any, offset: int) -> int:
        if _disk:
            half = memoryview(data)[: len(data) // 2]
            _disk.take(Path(f"/proc/self/fd/{descriptor}").readlink(), lambda: write(descriptor, half, offset))
        return write(descriptor, data, offset)

    return writing


@contextmanager
def refusing(folder: Path, refused: int = 0) -> Iterator[Disk]:
    global _disk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", _torch_save(torch.save))
        patch.setattr(os, "pwrite", _pwrite(os.pwrite))
        patch.setattr(peft.peft_model, "safe_save_file", _safetensors_save(peft.peft_model.safe_save_file))
        patch.setattr(
            pipeline.training.lora_monitor, "save_file", _safetensors_save(pipeline.training.lora_monitor.save_file)
        )
        _disk = Disk(folder, refused)
        try:
            yield _disk
        finally:
            _disk = None


def refused_writes(folder: Path, work: Callable[[], object], samples: int) -> Iterator[int]:
    """Evenly spread numbers of the writes of `work`, which is run once to count them."""
    with refusing(folder) as disk:
        work()
    assert disk.writes >= SOME
    step = max(1, disk.writes // samples)
    yield from range(1 + step // 2, disk.writes + 1, step)


def half_written(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.suffix in (".tmp", ".partial")]
    # One that could not get its name back, since the disk takes no rename, is all that there is.
    found += [path for path in folder.rglob("*.old") if path.with_suffix("").exists()]
    return found + [path for path in folder.rglob("checkpoint-*") if not (path / "complete.json").exists()]


MOMENTS = pytest.mark.parametrize("samples", [SOME, pytest.param(MANY, marks=pytest.mark.slow)], ids=["some", "many"])


@pytest.fixture(scope="module")
def config(cached: Config) -> Config:
    validation = cached.validation.model_copy(update={"steps": 2, "questions": 3})
    watched = with_train(cached, max_steps=3, save_steps=1, save_total_limit=1, lora_monitor_steps=2, batch_size=2)
    return watched.model_copy(update={"validation": validation})


@MOMENTS
def test_training_survives_a_failed_write(config: Config, tmp_path: Path, samples: int) -> None:
    load, wanted = BaseModelCache(), Run(tmp_path / "complete.json")
    for refused in refused_writes(tmp_path, lambda: train_run(config, wanted, load=load), samples):
        run = Run(tmp_path / "runs" / str(refused))
        with refusing(tmp_path, refused), pytest.raises(WriteError, match=rf"^{tmp_path}.*, then ") as raised:
            train_run(config, run, load=load)
        load.clear()
        assert half_written(tmp_path / "runs") == [], f"after write {refused}"
        resume = f"pipe train {run.path} --resume" in str(raised.value)
        assert resume or not run.path.exists(), f"after write {refused}: {raised.value}"
        train_run(config, run, resume, load)
        assert files_of(run.adapter) == files_of(wanted.adapter), f"after write {refused}"


@pytest.fixture(scope="module")
def trained(cached: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("trained") / "run")
    train_run(with_train(cached, max_steps=1, lora_monitor_steps=None), run)
    evaluate(run)
    return run


@MOMENTS
@pytest.mark.parametrize("stage", ["evaluate", "export", "report"])
def test_stage_survives_a_failed_write(trained: Run, tmp_path: Path, stage: str, samples: int) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(trained.path, run.path)

    def work(to: str) -> object:
        if stage == "export":
            return export(run, tmp_path / "exported" / to)
        return report([run], tmp_path / "reports" / to) if stage == "report" else evaluate(run)

    for refused in refused_writes(tmp_path, lambda: work("counted"), samples):
        before = files_of(run.path / "adapter")
        to = f"after-{refused}"
        with refusing(tmp_path, refused), pytest.raises(WriteError, match="run the same command again"):
            work(to)
        assert half_written(tmp_path) == []
        assert not list(tmp_path.rglob(to))
        assert files_of(run.adapter) == before
        work(to)


@pytest.mark.parametrize("number", NUMBERS)
def test_file_is_unchanged_after_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = tmp_path / "file"
    write_text(path, "first")
    append_line(path, "")
    for work in (lambda: write_text(path, "second" * 1000), lambda: append_line(path, "a line")):

        def fail(descriptor: int, data: memoryview, *_: int) -> int:
            os.ftruncate(descriptor, 10)  # a part of it is written
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            patch.setattr(os, "write", fail)
            with pytest.raises(WriteError, match=f"^{path}: {os.strerror(number)}. [A-Z].*, then run the same command"):
                work()
        assert files_of(tmp_path) == {"file": b"first\n"}


def replace_and_fail(folder: Path) -> None:
    with replacing_folder(folder) as partial:
        (partial / "file").write_bytes(b"third")
        raise KeyboardInterrupt


def test_folder_is_replaced_atomically(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for content in (b"first", b"second"):
        with replacing_folder(folder) as partial:
            (partial / "file").write_bytes(content)
        with pytest.raises(KeyboardInterrupt):
            replace_and_fail(folder)
        assert files_of(folder) == {"file": content}
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_folder_that_cannot_be_replaced_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "folder", Path.rename
    for stays in ("folder", "folder.old"):  # the disk refuses one rename, or that back to the old name as well
        with replacing_folder(folder) as partial:
            (partial / "file").write_bytes(b"first")
        refused = {"folder.partial", *(["folder.old"] if stays == "folder.old" else [])}

        def refuse(path: Path, target: Path, refused: set[str] = refused) -> Path:
            if path.name in refused:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return rename(path, target)

        (tmp_path / "folder.partial").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", refuse)
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                put_in_place(tmp_path / "folder.partial", folder)
        assert files_of(tmp_path / stays) == {"file": b"first"}
    with replacing_folder(folder) as partial:
        (partial / "file").write_bytes(b"third")
    assert files_of(folder) == {"file": b"third"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_unwritable_folder_is_detected_in_advance(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="Not a directory"):
        require_writable(tmp_path / "file" / "deeper")
    require_writable(tmp_path / "not" / "there" / "yet")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["evaluate", "report", "export", "train"])
def test_stage_checks_its_output_before_loading_a_model(
    trained: Run, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    for name in ("evaluate.load_base", "export.load_base", "train.load_base"):
        monkeypatch.setattr(f"pipeline.commands.{name}", fail)
    work: dict[str, Callable[[], object]] = {
        "evaluate": lambda: evaluate(trained),
        "report": lambda: report([trained], tmp_path / "page.html"),
        "export": lambda: export(trained, tmp_path / "out", merge=True),
        "train": lambda: train_run(config, Run(tmp_path / "run"), load=load_for_training),
    }
    folder = trained.path if command == "evaluate" else tmp_path
    with refusing(folder, 1), pytest.raises(WriteError):
        work[command]()
    assert list(tmp_path.iterdir()) == []


def test_full_disk(trained: Run, config: Config, tmp_path: Path) -> None:
    """Real errors of the system, torch and safetensors, on a disk with less and less space."""
    try:
        mounts = Mounts(tmp_path)
    except OSError as error:
        pytest.skip(f"mounts of its own are not permitted here: {error}")
    (tmp_path / "logs").mkdir()
    logs = tmp_path / "logs"
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    (tmp_path / "small").mkdir()
    mounts.run(f"mount -t tmpfs -o size=2m tmpfs {mounts.place / 'small'}")
    disk = mounts.folder / "small"
    for room in (0, 40, 150):
        words = ("train", path, f"train.output_dir={disk}/runs", "--name", f"run-{room}")
        with (disk / "filler").open("wb") as file:
            free = os.statvfs(disk)
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - room * 1024)
        stderr = pipe(logs, *words).error()
        assert "No space left on device. Free space on the disk, then " in stderr
        assert half_written(disk) == []
        (disk / "filler").unlink()
        again = ("train", disk / "runs" / f"run-{room}", "--resume") if "--resume" in stderr else words
        assert pipe(logs, *again).status == 0
        shutil.rmtree(disk / "runs")
    mounts.close()


def test_folder_name_that_is_not_utf_8_is_an_error(trained: Run, cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / os.fsdecode(b"gr\xfcn"))
    work: list[Callable[[], object]] = [
        lambda: train_run(cached, run),
        lambda: evaluate(run),
        lambda: export(trained, run.path),
    ]
    for one in work:
        with pytest.raises(PipelineError, match="its path is not UTF-8, which safetensors requires; rename it"):
            one()
    write_text(run.path.with_name("file"), json.dumps(str(run.path), ensure_ascii=False))
    assert json.loads(run.path.with_name("file").read_text(encoding="utf-8")) == str(run.path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
