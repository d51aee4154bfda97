"""Commands forked from a Python that has its libraries imported: the same bytes for a third of a cold start's time.

    warm = Warm(environment)
    process = warm.popen(["-m", "cm_train.commands.train", "mode=edm"], stderr=subprocess.PIPE, text=True)

One process, the server, imports torch, Hydra and what else is slow, but nothing of cm_train, and starts no thread.
Each command is a fork of it that imports cm_train afresh. One that starts ranks keeps forks of its own beginning for
them, so that they are warm too, and still its own children. What only a cold start shows (a signal while libraries are
imported, variables that an interpreter or a library reads at its start) is for tests that start commands cold.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib.util
import io
import json
import os
import re
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

LIBRARIES = (
    *("torch", "torch._dynamo", "torch.distributed", "torch.utils.flop_counter", "torch.utils.module_tracker", "numpy"),
    *("hydra", "hydra.core.plugins", "hydra._internal.hydra", "omegaconf", "pydantic", "yaml"),
    *(f"hydra._internal.core_plugins.{name}" for name in ("basic_launcher", "basic_sweeper", "file_config_source")),
    *(f"hydra._internal.core_plugins.{name}_completion" for name in ("bash", "fish", "zsh")),
    *("hydra._internal.core_plugins.importlib_resources_config_source",),
    *("hydra._internal.core_plugins.structured_config_source",),
    *("pydantic.main", "pydantic.types", "pydantic.functional_serializers", "pydantic.functional_validators"),
    *("rich.progress", "rich.console", "rich.table", "safetensors.torch", "PIL.Image", "wandb"),
)
EXTRAS = (  # that may be missing
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher",
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher",
)
# Variables that are read while a library is imported, or by the interpreter itself: a fork has the server's.
READ_EARLY = (
    "LANG",
    "LC_",
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "OPENBLAS_",
    "TORCH_LOGS",
    "TORCHINDUCTOR_",
    "PYTORCH_",
    "CUDA_",
    "LD_",
    "PYTHON",
)
# But these are read again, and the last is a matter of speed.
LATE = {"PYTHONPATH", "PYTHONSAFEPATH", "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"}
_ORDER_BYTES, _MOST_FDS = 1 << 20, 32
_INTERRUPTED = 130  # and killed by SIGINT in the end, where that is not blocked
_PATIENCE_S = 60.0


def read_early(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a fork can't take over from its order."""
    return {k: v for k, v in environment.items() if k.startswith(READ_EARLY) and k not in LATE}


@dataclass(frozen=True)
class Order:
    """What a fork is to be.

    Attributes:
        argv: what stands behind `python`: -m and a module, -c and a program, or a script; and their arguments.
        descriptors: the numbers that the descriptors sent along get.
        mask: the signals blocked at the beginning.
        children: how many Pythons it may start warm.
        closed: numbers of descriptors to close.
    """

    argv: list[str]
    cwd: str
    environment: dict[str, str]
    descriptors: list[int]
    new_session: bool
    mask: list[int]
    children: int = 0
    closed: list[int] = field(default_factory=list)

    def send(self, line: socket.socket, descriptors: Sequence[int]) -> None:
        """To whoever `receive`s it at the other end; descriptors beyond this order's go to the server."""
        socket.send_fds(line, [json.dumps(asdict(self)).encode()], descriptors)

    @classmethod
    def receive(cls, line: socket.socket) -> "tuple[Order, list[int]] | None":
        """None where the other end has gone."""
        content, descriptors, _, _ = socket.recv_fds(line, _ORDER_BYTES, _MOST_FDS)
        return (cls(**json.loads(content)), descriptors) if content else None


# --------------------------------------------------------------------------------------------------- the tests' side


class Warm:
    """The server of one test process: `popen` is subprocess.Popen of a Python, by a fork; on Linux alone."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._server = None
        if not sys.platform.startswith("linux"):
            return
        self._line, theirs = _pair()
        self._early = read_early(self.environment)
        argv = [sys.executable, str(Path(__file__)), str(theirs.fileno())]
        with theirs:
            self._server = subprocess.Popen(argv, env=self.environment, pass_fds=[theirs.fileno()])

    def popen(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        children: int | None = None,
        closed: Sequence[int] = (),
        **kwargs: Any,
    ) -> subprocess.Popen:
        """The running process of `python argv...`.

        Args:
            children: how many Pythons it may start warm; None: as many as its arguments let expect.
            closed: numbers of standard streams that it is not to have.
        """
        env = self.environment if env is None else env
        if self._server is None:
            close = (lambda: [os.close(number) for number in closed]) if closed else None
            return subprocess.Popen([sys.executable, *argv], env=env, preexec_fn=close, **kwargs)
        assert read_early(env) == self._early, (
            f"to be started cold: {read_early(env)}, and the server has {self._early}"
        )
        children = _num_children(argv) if children is None else children
        return _Fork(
            [sys.executable, *argv],
            env=env,
            _line=self._line,
            _more={"children": children, "closed": [*closed]},
            **kwargs,
        )

    def run(self, argv: Sequence[str], timeout: float = 300.0, **kwargs: Any) -> subprocess.CompletedProcess:
        """The finished process of `python argv...`, its streams captured as text."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with self.popen(argv, **{**pipes, **kwargs}) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def close(self) -> None:
        """End the server, once its commands have ended."""
        if self._server is not None:
            self._line.close()
            try:
                self._server.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._server.kill()
                raise RuntimeError(f"commands that a test has started go on after {_PATIENCE_S:.0f} s") from None


class _Fork(subprocess.Popen):
    """A Popen whose process the server forks, and waits for."""

    def __init__(self, *args: Any, _line: socket.socket, _more: dict[str, Any], **kwargs: Any) -> None:
        self._line, self._more = _line, _more
        super().__init__(*args, **kwargs)

    def _execute_child(self, *args: Any) -> None:
        def start(order: Order, descriptors: Sequence[int]) -> int:
            self._ended, theirs = socket.socketpair()
            with theirs:
                replace(order, **self._more).send(self._line, [*descriptors, theirs.fileno()])
            answer = self._ended.recv(4)
            if len(answer) < 4:
                raise RuntimeError("the warm server has ended; what it said is above")
            return int.from_bytes(answer, "little")

        _execute(self, start, *args)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        self._ended.setblocking(not wait_flags)
        try:
            status = self._ended.recv(4)
        except BlockingIOError:
            return 0, 0
        self._ended.close()
        return self.pid, int.from_bytes(status, "little") if status else signal.SIGKILL

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def _execute(popen: Any, start: Callable[[Order, Sequence[int]], int], *args: Any) -> None:
    """What subprocess.Popen does in `_execute_child`, by `start`, which returns the process's number."""
    argv, _, preexec_fn, _, pass_fds, cwd, environment, _, _, shell, *pipes = args[:16]
    new_session = args[21]
    assert preexec_fn is None and not shell
    child_ends = [pipes[0], pipes[3], pipes[5]]  # stdin's, stdout's and stderr's, -1 where the child shares ours
    standard = [number if end == -1 else end for number, end in enumerate(child_ends)]
    order = Order(
        argv=[os.fspath(word) for word in argv[1:]],
        cwd=os.fspath(cwd or os.getcwd()),
        environment=dict(os.environ if environment is None else environment),
        descriptors=[0, 1, 2, *pass_fds],
        new_session=new_session,
        mask=[int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    )
    popen.pid, popen._child_created = start(order, [*standard, *pass_fds]), True
    ours = {end for end, other in zip(child_ends, (pipes[1], pipes[2], pipes[4]), strict=True) if other != -1}
    for end in (ours | {getattr(popen, "_devnull", -1)}) - {-1}:
        os.close(end)


def _pair() -> tuple[socket.socket, socket.socket]:
    """Two ends between which an order arrives whole or not at all."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


# -------------------------------------------------------------------------------------------------- the server's side


def serve(line: socket.socket) -> None:
    """Fork what is ordered, and tell of each fork how it ended, until the other end is closed and all have ended."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for name in EXTRAS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    _compile_ahead("cm_train")
    assert threading.active_count() == 1, "a fork of several threads has one of them"
    gc.collect()
    gc.freeze()  # forks share these pages
    heard, spoken = socket.socketpair()
    spoken.setblocking(False)
    signal.set_wakeup_fd(spoken.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # A fork that is sent a signal before it has become what was ordered gets it then.
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals() - {signal.SIGCHLD})
    living: dict[int, socket.socket] = {}  # where the end of each is told
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        selector.register(heard, selectors.EVENT_READ)
        is_open = True
        while is_open or living:
            for key, _ in selector.select():
                if key.fileobj is heard:
                    heard.recv(1024)
                    _tell_of_the_dead(living)
                elif received := Order.receive(line):
                    order, (*descriptors, ended) = received
                    pid = os.fork()
                    if not pid:
                        signal.set_wakeup_fd(-1)
                        for other in (line, heard, spoken, *living.values()):
                            other.close()
                        os.close(ended)
                        selector.close()
                        become(order, descriptors, [_Spare() for _ in range(order.children)])
                    living[pid] = socket.socket(fileno=ended)
                    with contextlib.suppress(OSError):  # whoever ordered it has given up
                        living[pid].send(pid.to_bytes(4, "little"))
                    for descriptor in descriptors:
                        os.close(descriptor)
                else:
                    selector.unregister(line)
                    is_open = False


def _compile_ahead(package: str) -> None:
    """Where no bytecode is written, each fork would compile the package again: it finds here what is as it was."""
    spec = importlib.util.find_spec(package)
    if not sys.dont_write_bytecode or spec is None or spec.submodule_search_locations is None:
        return
    compiled = {}
    for path in Path(spec.submodule_search_locations[0]).rglob("*.py"):
        compiled[str(path)] = (path.stat().st_mtime_ns, compile(path.read_bytes(), path, "exec"))
    as_usual = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, fullname: str) -> CodeType | None:
        changed, code = compiled.get(loader.path, (0, None))
        return code if code is not None and os.stat(loader.path).st_mtime_ns == changed else as_usual(loader, fullname)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


def _tell_of_the_dead(living: dict[int, socket.socket]) -> None:
    for pid in list(living):
        dead, status = os.waitpid(pid, os.WNOHANG)
        if dead:
            with living.pop(pid) as ended, contextlib.suppress(OSError):  # nobody asks any more
                ended.send(status.to_bytes(4, "little"))


def _num_children(argv: Sequence[str]) -> int:
    """How many Pythons a command may start warm: its ranks; in a sweep the first few, its jobs' one after the other."""
    ranks = next((int(word[8:]) for word in argv[2:] if re.fullmatch(r"devices=\d", word)), 1)
    if {"-m", "--multirun"} & set(argv[2:]):
        return max(4, ranks)
    return ranks if ranks > 1 else 0


class _Spare:
    """A fork of this process that waits for its order."""

    def __init__(self) -> None:
        self.line, theirs = _pair()
        self.pid = os.fork()
        if not self.pid:
            self.line.close()
            received = Order.receive(theirs)
            theirs.close()
            if received is None:
                os._exit(0)
            become(*received, [])
        theirs.close()


def become(order: Order, descriptors: Sequence[int], spares: list[_Spare]) -> NoReturn:
    """Be the process that was ordered, from its beginning to its end."""
    code: int = 1
    try:
        _take_over(order, descriptors, {spare.line.fileno() for spare in spares})
        if spares:
            _start_children_from(spares)
        code = _exit_code_of(lambda: _run(order.argv))
        threading._shutdown()  # type: ignore[attr-defined] - waits for its threads, as an interpreter does
        atexit._run_exitfuncs()
        try:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                with contextlib.suppress(ValueError):  # closed
                    stream.flush()
        except OSError as error:
            code = 120  # as an interpreter whose stdout can't be written
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        if code == _INTERRUPTED:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _take_over(order: Order, descriptors: Sequence[int], kept: Iterable[int]) -> None:
    assert not {*order.descriptors} & {*kept}
    if order.new_session:
        os.setsid()
    # First out of the way of the numbers that they get.
    high = [_duplicate_above(descriptor) for descriptor in descriptors]
    for source, number in zip(high, order.descriptors, strict=True):
        os.dup2(source, number)
    wanted = {*order.descriptors, *kept} - {*order.closed}
    for other in {int(name) for name in os.listdir("/proc/self/fd")} - wanted:
        with contextlib.suppress(OSError):
            os.close(other)
    os.chdir(order.cwd)
    os.environ.clear()
    os.environ.update(order.environment)
    tempfile.tempdir = None  # to be found again
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = _stream(number, getattr(sys, f"__{name}__"))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    where = {"-m": order.cwd, "-c": ""}.get(order.argv[0], os.path.dirname(os.path.abspath(order.argv[0])))
    first = [] if os.environ.get("PYTHONSAFEPATH") else [where]
    sys.path[:] = [*first, *_import_paths(), *_ITS_OWN_PATH]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, order.mask)


def _import_paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _duplicate_above(descriptor: int, least: int = 100) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, least)


def _stream(number: int, of_server: io.TextIOWrapper) -> io.TextIOWrapper | None:
    """The interpreter's own kind of stream, for the file that has this number now."""
    try:
        os.fstat(number)
    except OSError:
        return None
    is_unbuffered = of_server.write_through
    buffer = open(number, "wb" if number else "rb", 0 if is_unbuffered and number else -1, closefd=False)  # noqa: SIM115
    by_line = not is_unbuffered and (number == 2 or os.isatty(number))
    settings = {"line_buffering": by_line, "write_through": is_unbuffered}
    return io.TextIOWrapper(buffer, of_server.encoding, of_server.errors, **settings)


def _run(argv: Sequence[str]) -> None:
    if argv[0] == "-m":
        sys.argv = ["-m", *argv[2:]]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] != "-c":
        sys.argv = list(argv)
        runpy.run_path(argv[0], run_name="__main__")
    else:
        sys.argv = ["-c", *argv[2:]]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(argv[1], "<string>", "exec"), main.__dict__)


def _exit_code_of(body: Callable[[], None]) -> int:
    """As an interpreter ends with it."""
    try:
        body()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return int(end.code or 0)
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return _INTERRUPTED
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _start_children_from(spares: list[_Spare]) -> None:
    """Have subprocess.Popen take a spare for each child that can be warm."""
    cold = subprocess.Popen._execute_child  # type: ignore[attr-defined]
    early = read_early(os.environ)

    def execute(popen: Any, argv: Any, *rest: Any) -> None:
        environment, preexec_fn = rest[5], rest[1]
        is_ours = isinstance(argv, list) and argv[:2] == [sys.executable, "-m"]
        is_alike = read_early(os.environ if environment is None else environment) == early
        if not (spares and is_ours and is_alike and preexec_fn is None):
            cold(popen, argv, *rest)
            return
        spare = spares.pop(0)

        def start(order: Order, descriptors: Sequence[int]) -> int:
            with spare.line:
                order.send(spare.line, descriptors)
            return spare.pid

        _execute(popen, start, argv, *rest)

    subprocess.Popen._execute_child = execute  # type: ignore[attr-defined]


# Of a server: without the folder of this file, which comes first, and without what a fork is told anew.
_ITS_OWN_PATH = sys.path[1 + len(_import_paths()) :]

if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
