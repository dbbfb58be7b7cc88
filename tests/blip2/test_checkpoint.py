"""Each stage reads its own half of a checkpoint, and downloads no other."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from checkpoints import shards_of
from safetensors.torch import load_file, save_file
from transformers import Blip2ForConditionalGeneration

from pipeline.blip2.checkpoint import ENCODER_PREFIXES, LANGUAGE_MODEL_PREFIXES, WEIGHTS, fetch_checkpoint, fingerprint
from pipeline.blip2.encoder import Blip2Encoder, load_encoder
from pipeline.blip2.language_model import Blip2LanguageHalf, load_language_half
from pipeline.common.errors import PipelineError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sharded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint in many shards, like large checkpoints."""
    folder = tmp_path_factory.mktemp("sharded")
    model = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    model.half().save_pretrained(folder, max_shard_size="200KB")
    for path in checkpoint.glob("*.json"):
        if not (folder / path.name).exists():
            shutil.copy(path, folder)
    return folder


def test_full_disk_of_temporary_files_is_reported(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("Path.symlink_to", "Path.write_text", "TemporaryDirectory"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pipeline.blip2.checkpoint.{name}", fail)
            with pytest.raises(PipelineError, match=r"No space left on device\); free some space there, or set TMPDIR"):
                load_language_half(sharded, CPU, torch.float32)


def without_the_other_half(sharded: Path, half: tuple[str, ...], other: tuple[str, ...], folder: Path) -> Path:
    """A copy without the shards that only the other half needs."""
    shutil.copytree(sharded, folder)
    gone = shards_of(sharded, other) - shards_of(sharded, half)
    assert len(gone) >= 3
    for shard in gone:
        (folder / shard).unlink()
    return folder


def poisoned(checkpoint: Path, half: tuple[str, ...], folder: Path) -> Path:
    """A copy, in one file, in which every tensor of `half` is NaN."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(checkpoint / WEIGHTS)
    for name in tensors:
        if name.startswith(half):
            tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_halves_together_have_the_parameters_of_the_full_model(checkpoint: Path) -> None:
    names = set(load_file(checkpoint / WEIGHTS))
    encoder = set(load_encoder(checkpoint, CPU, torch.float32).state_dict())
    language = set(load_language_half(checkpoint, CPU, torch.float32, bits=None).state_dict())
    tied = {"language_model.lm_head.weight"}
    assert encoder | (language - tied) == names - tied
    assert not encoder & language


def test_encoder_loads_without_shards_of_the_language_model(sharded: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = without_the_other_half(sharded, ENCODER_PREFIXES, LANGUAGE_MODEL_PREFIXES, tmp_path / "half")
    pixel_values = torch.randn(2, 3, 64, 64)
    half, whole = (load_encoder(path, CPU, torch.float32) for path in (folder, checkpoint))
    assert torch.equal(half(pixel_values), whole(pixel_values))


def test_language_half_loads_without_shards_of_the_encoder(sharded: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = without_the_other_half(sharded, LANGUAGE_MODEL_PREFIXES, ENCODER_PREFIXES, tmp_path / "half")
    half, whole = (load_language_half(path, CPU, torch.float32).state_dict() for path in (folder, checkpoint))
    assert half.keys() == whole.keys()
    assert all(torch.equal(half[name], whole[name]) for name in whole)


@pytest.mark.parametrize("half", [ENCODER_PREFIXES, LANGUAGE_MODEL_PREFIXES], ids=["encoder", "language"])
def test_no_tensor_of_the_other_half_is_read_from_a_single_file(
    checkpoint: Path, tmp_path: Path, half: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each materialized tensor is read through a slice of the file: count them by name."""
    import transformers.modeling_utils as loading

    read: set[str] = set()

    class Slice:
        def __init__(self, name: str, inner: object):
            self.name, self.inner = name, inner

        def __getitem__(self, key: object) -> torch.Tensor:
            read.add(self.name)
            return self.inner[key]

        def __getattr__(self, attribute: str) -> object:
            return getattr(self.inner, attribute)

    class File:
        def __init__(self, *arguments: object, **named: object):
            self.inner = real_open(*arguments, **named)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.inner.get_slice(name))

        def get_tensor(self, name: str) -> torch.Tensor:
            read.add(name)
            return self.inner.get_tensor(name)

        def __enter__(self) -> "File":
            self.inner.__enter__()
            return self

        def __exit__(self, *arguments: object) -> None:
            self.inner.__exit__(*arguments)

        def __getattr__(self, attribute: str) -> object:
            return getattr(self.inner, attribute)

    real_open = loading.safe_open
    monkeypatch.setattr(loading, "safe_open", File)
    model = Blip2Encoder if half is ENCODER_PREFIXES else Blip2LanguageHalf
    model.from_pretrained(checkpoint, dtype=torch.float32)
    assert len(read) > 50
    assert {name for name in read if not name.startswith(half)} == set()


def test_nan_in_the_other_half_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    encoder = load_encoder(poisoned(checkpoint, LANGUAGE_MODEL_PREFIXES, tmp_path / "a"), CPU, torch.float32)
    assert torch.isfinite(encoder(torch.randn(1, 3, 64, 64))).all()
    language = load_language_half(poisoned(checkpoint, ENCODER_PREFIXES, tmp_path / "b"), CPU, torch.float32, bits=None)
    assert all(torch.isfinite(weight).all() for weight in language.state_dict().values())


def test_only_linear_layers_of_opt_are_quantized(checkpoint: Path) -> None:
    import bitsandbytes

    model = load_language_half(checkpoint, CPU, torch.float32)
    quantised = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(quantised) == 4 * 6  # q, k, v, out, fc1, fc2 in four layers
    assert all(name.startswith("language_model.model.decoder.layers.") for name in quantised)
    state = model.language_model.model.decoder.layers[0].fc1.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert {weight.dtype for weight in model.language_projection.parameters()} == {torch.float32}


def test_fingerprint_covers_the_encoder_only(checkpoint: Path, sharded: Path, tmp_path: Path) -> None:
    known = fingerprint(checkpoint, ENCODER_PREFIXES)
    assert len(known) == 64
    assert fingerprint(sharded, ENCODER_PREFIXES) == known
    assert fingerprint(poisoned(checkpoint, LANGUAGE_MODEL_PREFIXES, tmp_path / "a"), ENCODER_PREFIXES) == known
    for number, tensor in enumerate(("query_tokens", "qformer.layernorm.weight", "vision_model.post_layernorm.bias")):
        assert fingerprint(poisoned(checkpoint, (tensor,), tmp_path / f"b{number}"), ENCODER_PREFIXES) != known


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "only safetensors is supported"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"short"), "not a readable safetensors file"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 100), "header too large"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llava"}'),
            "supports BLIP-2",
        ),
    ],
)
def test_invalid_checkpoint_folder_is_an_error(checkpoint: Path, tmp_path: Path, damage: object, message: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    with pytest.raises(PipelineError, match=message):
        fetch_checkpoint(str(folder), None, ENCODER_PREFIXES)


def test_missing_shard_is_an_error_with_its_name(sharded: Path, tmp_path: Path) -> None:
    folder = without_the_other_half(sharded, ENCODER_PREFIXES, LANGUAGE_MODEL_PREFIXES, tmp_path / "half")
    fetch_checkpoint(str(folder), None, ENCODER_PREFIXES)
    with pytest.raises(PipelineError, match=r"incomplete: missing model-\d+"):
        fetch_checkpoint(str(folder), None, LANGUAGE_MODEL_PREFIXES)


def test_checkpoint_without_a_tokenizer_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    from pipeline.data.text import PromptTokenizer

    folder = tmp_path / "no-tokenizer"
    shutil.copytree(checkpoint, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(PipelineError, match="the checkpoint has no tokenizer"):
        PromptTokenizer(folder, "{question}")


class _Hub(BaseHTTPRequestHandler):
    """A minimal model hub with one repository at one commit."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: set[str]

    def __init__(self, folder: Path, asked: set[str], *arguments: object):
        self.folder, self.asked = folder, asked
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        file = self.folder / path.rpartition("/")[2]
        if path.startswith("/api/models/someone/blip2/tree/"):
            files = [{"type": "file", "path": found.name, "size": found.stat().st_size, "oid": found.name}
                     for found in sorted(self.folder.iterdir())]  # fmt: skip
            self.reply(json.dumps(files).encode(), body)
        elif path.startswith("/api/models/someone/blip2"):
            files = [{"rfilename": found.name} for found in sorted(self.folder.iterdir())]
            self.reply(json.dumps({"id": "someone/blip2", "sha": self.commit, "siblings": files}).encode(), body)
        elif path.startswith("/someone/blip2/resolve/") and file.is_file():
            self.asked.add(file.name)
            self.reply(file.read_bytes(), body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if "someone/blip2" not in path else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def reply(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF:08x}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(sharded: Path, tmp_path: Path) -> Iterator[tuple[dict[str, str], set[str]]]:
    """Environment variables of a local hub, and the names of the files requested from it."""
    asked: set[str] = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, sharded, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}, asked
    server.shutdown()


def fetch_in_a_new_process(checkpoint: str, half: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    code = (
        "from pipeline.blip2.checkpoint import *\n"
        f"print(fetch_checkpoint({checkpoint!r}, 'v1', {half}))\n"
    )  # fmt: skip
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("half", ["ENCODER_PREFIXES", "LANGUAGE_MODEL_PREFIXES"])
def test_only_needed_shards_are_downloaded(hub: tuple[dict[str, str], set[str]], sharded: Path, half: str) -> None:
    environment, asked = hub
    done = fetch_in_a_new_process("someone/blip2", half, environment)
    assert done.returncode == 0, done.stderr
    wanted = shards_of(
        sharded, {"ENCODER_PREFIXES": ENCODER_PREFIXES, "LANGUAGE_MODEL_PREFIXES": LANGUAGE_MODEL_PREFIXES}[half]
    )
    assert {name for name in asked if name.endswith(".safetensors")} == wanted
    assert len(wanted) < len(list(sharded.glob("*.safetensors")))
    folder = Path(done.stdout.strip())
    load = load_encoder if half == "ENCODER_PREFIXES" else load_language_half
    assert load(folder, CPU, torch.float32) is not None


def test_unknown_hub_id_is_an_error_in_one_line(hub: tuple[dict[str, str], set[str]]) -> None:
    done = fetch_in_a_new_process("nobody/nothing", "ENCODER_PREFIXES", hub[0])
    assert done.returncode == 1
    assert "PipelineError: checkpoint 'nobody/nothing' (model.checkpoint) is not a local folder" in done.stderr
