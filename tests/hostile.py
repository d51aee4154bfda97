"""Run folders as a stranger might make them, and what the commands make of those; run by test_hostile.py.

    python hostile.py FOLDER SHARE     in FOLDER, which holds a good run `good`; every SHARE-th case

Prints a line for each case that did not end well: in a result or one line, in bounded time and memory.
"""

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from cm_train.commands import sample, train
from cm_train.models.checkpoints.manifest import signed
from cm_train.runs import worker  # noqa: F401 - two here rather than in every child
from conftest import TINY

RUN = Path("runs/good")
NEWEST = RUN / "checkpoints" / "step_00000006"
OUT = Path("out")  # what cm-sample writes, and goes on with
PATIENCE_S, MEMORY = 60, 12 << 30
COMMANDS = {
    "sample": (["cm-sample", f"ckpt={RUN}", "num=3", "out=out"], sample.main),
    "train": (["cm-train", "mode=ict", "name=good", *TINY, "steps=8", "schedule_steps=6"], train.main),
}
FILES = ["config.yaml", "metrics.jsonl", ".lock", ".saved.json", "checkpoints", "samples", "checkpoints/step_00000006"]
FILES += [f"checkpoints/step_00000006/{name}" for name in ("manifest.json", "state.pt", "denoiser.safetensors")]
OUT_FILES = ["request.json", "images", "images/00000001.png", "grid.png"]
IN_ITS_PLACE: dict[str, Callable[[Path], object]] = {
    "a folder": lambda p: p.mkdir(),
    "a pipe": os.mkfifo,
    "a link to /dev/zero": lambda p: p.symlink_to("/dev/zero"),
    "a link to itself": lambda p: p.symlink_to(p.name),
    "a link to nothing": lambda p: p.symlink_to("/nowhere/at all"),
    "nothing in it": lambda p: p.write_bytes(b""),
    "noise": lambda p: p.write_bytes(os.urandom(5000)),
    "zeros": lambda p: p.write_bytes(bytes(5000)),
    "another encoding": lambda p: p.write_bytes('{"a": 1}\n'.encode("utf-16")),
    "eight empty GB": lambda p: (p.write_bytes(b""), os.truncate(p, 8 << 30)),
    "a deep list": lambda p: p.write_bytes(b"[" * 200_000),
    "a list": lambda p: p.write_bytes(b"[1, 2]\n"),
    "a long number": lambda p: p.write_bytes(b"9" * 5000 + b"\n"),
    "half a character": lambda p: p.write_bytes(b'{"step": "\\ud800"}\n'),
}
VALUES = [None, -1, 0, 10**30, 2**63, 1e308, "x", [], {}, [[]], True, "\x1b[31mred", "a" * 100_000, 3.5, "\ud800"]
NAMES = ["step_99999999999999999999", "step_\u0661", "step_00000009", "step_", "step_-1", "step_1e9", "step_\x1b[31m"]


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Each harm and its name."""
    for file in FILES:
        for kind, make in IN_ITS_PLACE.items():
            yield f"{file} is {kind}", lambda file=file, make=make: put(RUN / file, make)
    for file in OUT_FILES:
        for kind, make in IN_ITS_PLACE.items():
            yield f"{file} of the images is {kind}", lambda file=file, make=make: put(begun(file), make)
    for key in json.loads((Path("good_out") / "request.json").read_text()):
        for value in VALUES:
            yield f"request {key}={str(value)[:12]!r}", lambda k=key, v=value: in_request(k, v)
    manifest = json.loads((Path("good") / NEWEST.relative_to(RUN) / "manifest.json").read_text())
    for path in [[key] for key in manifest] + [[k, n] for k in ("denoiser", "backbone") for n in manifest[k]]:
        for value in VALUES:
            yield f"manifest {'.'.join(path)}={str(value)[:12]!r}", lambda p=path, v=value: in_manifest(p, v)
    for key in yaml.safe_load(Path("good/config.yaml").read_text()):
        for value in VALUES:
            yield f"config {key}={str(value)[:12]!r}", lambda k=key, v=value: in_config(k, v)
    for name in NAMES:
        yield f"a checkpoint called {name!r}", lambda name=name: shutil.copytree(NEWEST, NEWEST.with_name(name))
    yield "a state of deep lists", lambda: in_state(b"]" * 100_000 + b"a" * 99_999)
    yield "a state of a tree", lambda: in_state(b"}()q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01u")
    yield "a state of duplicates", lambda: in_state(b")" + b"2\x86" * 60)


def put(path: Path, make: Callable[[Path], object]) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make(path)


def in_manifest(path: list[str], value: object) -> None:
    file = NEWEST / "manifest.json"
    inner = values = json.loads(file.read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(signed(values))


def in_config(key: str, value: object) -> None:
    values = yaml.safe_load((RUN / "config.yaml").read_text()) | {key: value}
    (RUN / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def in_request(key: str, value: object) -> None:
    file = begun("request.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


def begun(file: str) -> Path:
    """One of the files of a request of which the first images are there."""
    shutil.copytree("good_out", OUT)
    return OUT / file


def in_state(pickled: bytes) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("state/data.pkl", b"\x80\x02" + pickled + b".")
        archive.writestr("state/version", b"3\n")
        archive.writestr("state/byteorder", b"little")
    content = buffer.getvalue()
    (NEWEST / "state.pt").write_bytes(content)
    in_manifest(["files", "state.pt"], {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)})


def outcome(argv: list[str], main: Callable[[], None]) -> tuple[int, str]:
    """Exit code and output of a command in a process of its own; -SIGKILL where it took too long."""
    with open("output", "wb") as output:
        if (pid := os.fork()) == 0:
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            sys.argv[:] = argv
            code = 0
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    until = time.monotonic() + PATIENCE_S
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, Path("output").read_text(errors="replace")


def main() -> None:
    os.chdir(sys.argv[1])
    share, tried = int(sys.argv[2]), 0
    shutil.copytree("good", RUN)
    assert outcome(["cm-sample", f"ckpt={RUN}", "num=2", "out=good_out"], sample.main)[0] == 0
    for number, (name, harm) in enumerate(cases()):
        if number % share:
            continue
        for command, (argv, run) in COMMANDS.items():
            shutil.rmtree("runs", ignore_errors=True)
            shutil.rmtree(OUT, ignore_errors=True)
            shutil.copytree("good", RUN)
            with contextlib.suppress(UnicodeError):  # what can't be written can't be received
                harm()
            code, output = outcome(argv, run)
            tried += 1
            if code not in (0, 2) or "Traceback" in output or "\x1b[31" in output:
                print(f"{command}, {name}: code {code}: {output.strip()[-300:]!r}", flush=True)
    print(f"{tried} tried")


if __name__ == "__main__":
    main()
