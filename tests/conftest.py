"""Fixtures shared by the tests: small runs of the real trainer, and a config composed as the command does."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from cm_train.core import configs
from cm_train.core.command_line import tidy
from cm_train.training.tracking.names import group
from warm import Warm

# Fixtures that start whole processes: seconds a test, where the others take a fraction of one.
STARTERS = {"command", "start", "start_cold", "warm", "sweep", "train", "environment"}


def pytest_configure(config):
    # No test trains on a GPU unasked, nor does a command that one starts: what they expect is a CPU's arithmetic. Those
    # marked `gpu` are for one, and run with `pytest -m gpu`.
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    for item in items:
        if STARTERS & set(getattr(item, "fixturenames", ())):
            item.add_marker("command")


# The commands are started as from a terminal, even where the tests run under nohup or behind a shell.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The networks here are too small to share among threads, and other processes may want the cores.
torch.set_num_threads(1)
ENVIRONMENT = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}

# A digits run of a second or two.
TINY = ["tracking=none", "steps=6", "batch_size=16", "log_every=2", "preview_every=0", "save_every=3"]


@pytest.fixture
def composed():
    """compose(*overrides) -> the DictConfig that `cm-train` would get."""

    def compose(*overrides: str) -> DictConfig:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(configs.conf_dir()), version_base=None):
            return hydra.compose("train", overrides=tidy(overrides, configs.groups("train")))

    return compose


@pytest.fixture(scope="session")
def warm():
    """A Python with its libraries imported, to fork commands from: `warm.run(["-m", ...])` and `warm.popen`."""
    server = Warm(ENVIRONMENT)
    yield server
    server.close()


@pytest.fixture
def command(warm, tmp_path):
    """command("train", "mode=edm", ...) -> the finished process of `cm-train mode=edm ...` in an empty folder."""

    def run(name: str, *arguments: str, cwd: Path = tmp_path, **environment: str) -> subprocess.CompletedProcess:
        return warm.run(["-m", f"cm_train.commands.{name}", *arguments], cwd=cwd, env={**ENVIRONMENT, **environment})

    return run


@pytest.fixture
def start(warm, tmp_path):
    """start("train", ...) -> the running process of the command; killed at the end of the test."""
    yield from _starting(warm.popen, tmp_path)


@pytest.fixture
def start_cold(tmp_path):
    """As `start`, for what only a cold start has: its first seconds, and an environment that others see."""
    yield from _starting(lambda argv, **kwargs: subprocess.Popen([sys.executable, *argv], **kwargs), tmp_path)


def _starting(popen, folder):
    started = []

    def run(name: str, *arguments: str, **environment: str) -> subprocess.Popen:
        argv, env = ["-m", f"cm_train.commands.{name}", *arguments], {**ENVIRONMENT, **environment}
        # A session of its own, as in a terminal: a test can signal all of it at once.
        kwargs = {"cwd": folder, "env": env, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(popen(argv, **kwargs))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def timeless(rows: list[dict]) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the time or the machine."""
    return [{name: value for name, value in row.items() if group(name) != "perf"} for row in rows]


def wait_for(condition: Callable[[], bool], patience_s: float = 120.0) -> None:
    """Return as soon as `condition` holds; fail when it never does."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def children(pid):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(p) for p in out.split()]


def chunk(kind: bytes, data: bytes) -> bytes:
    """One of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(content: bytes, added: bytes) -> bytes:
    """`content`, a PNG, with one more chunk behind its first."""
    return content[:33] + added + content[33:]


class Website:
    """A web server of this machine: `files` by path, `asked` for in this order.

    `promised` bytes of a path are announced, whatever comes; `holds` are not answered before that event.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.promised: dict[str, int] = {}
        self.holds: dict[str, threading.Event] = {}
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append(self.path)
                if self.path in site.holds:
                    site.holds[self.path].wait(60)
                content = site.files.get(self.path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(site.promised.get(self.path, len(content or b""))))
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has gone
                    self.wfile.write(content or b"")

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def website(monkeypatch):
    """website.files["/a"] = b"..." is found at website.url + "/a"."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Website()
    yield site
    site.server.shutdown()
    site.server.server_close()
