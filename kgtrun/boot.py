"""What a trainer runs before the user's script: a file run by path, as `python -u boot.py MODE SCRIPT ARGS...`.

MODE is `script`, `module` (as python -m) or `path` (as runpy.run_path). The script sees what it would see under
torchrun: sys.argv, sys.path, `__main__`, `__file__`, tracebacks. Before that, without importing torch: the cores of
this process, a parent-death signal, stacks on demand, and the post-import hook that makes DDP freeze-aware. An
uncaught exception is also written to a file with the moment it was raised, so that the launcher can name the first
failure and show it.

Run by path and not by -m: a user's own `kgtrun` file must not be found first, and runpy need not be loaded.
"""

import sys

# Python put this file's directory here, where our module names could shadow the user's.
_OUR_DIR = sys.path.pop(0) if not sys.flags.safe_path else None

import os  # noqa: E402

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_USE_STACKS_SIGNAL = 64  # SIGRTMAX: no library and hardly a script uses it


def _import_ours(name: str):
    """Import a module of ours whether or not this checkout is installed."""
    import importlib

    sys.path.insert(0, _ROOT)
    try:
        return importlib.import_module(name)
    finally:
        if sys.path and sys.path[0] == _ROOT:
            sys.path.pop(0)


def _die_with_parent() -> None:
    """Have the kernel send TERM when the launcher dies; its reaper does the rest."""
    import ctypes
    import signal

    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it died between the two calls
        os.kill(os.getpid(), signal.SIGTERM)


def _use_cores(text: str) -> None:
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        print(f"kgtrun: cores {text} cannot be used: {error}", file=sys.stderr)


def _stacks_on_demand(path: str) -> None:
    """The launcher sends a signal when this rank makes no progress; all threads' stacks go to `path`."""
    import faulthandler

    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        faulthandler.register(_USE_STACKS_SIGNAL, file=fd, all_threads=True)
    except (OSError, ValueError, RuntimeError):
        pass


def _without_boot(traceback):
    """The part of a traceback that belongs to the user: what python itself would have shown."""
    skip = (os.path.abspath(__file__), "<frozen runpy>")
    while traceback is not None and traceback.tb_frame.f_code.co_filename in skip:
        traceback = traceback.tb_next
    return traceback


def _origin(error: BaseException) -> BaseException:
    """The first of the exceptions that led to this one, through causes and `finally` blocks that raised themselves."""
    seen = {id(error)}
    while True:
        before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if before is None or id(before) in seen:
            return error
        seen.add(id(before))
        error = before


def _record(error: BaseException, moment_s: float) -> None:
    """Write an uncaught exception for the launcher; never raises."""
    path = os.environ.get("KGTRUN_ERROR_FILE")
    if not path:
        return
    import json
    import traceback

    exited = isinstance(error, SystemExit)  # python prints no traceback for it, nor do we
    lines = [] if exited else traceback.format_exception(type(error), error, _without_boot(error.__traceback__))
    text = "".join(lines)
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    origin = "".join(traceback.format_exception_only(_origin(error)))[:2000]
    found = {"monotonic_s": moment_s, "code": code & 0xFF, "origin": origin, "traceback": text}
    try:
        with open(path, "w") as f:
            json.dump(found, f)
    except OSError:
        pass


def _excepthook(kind, error, traceback):
    # The interpreter shows the exception's own traceback, not the one it is given.
    sys.__excepthook__(kind, error.with_traceback(_without_boot(traceback)), error.__traceback__)


def _make_room() -> None:
    """A fresh `__main__` for the user; our own module object lives on, or our functions would lose their globals."""
    import builtins
    import types

    sys.modules["kgtrun.boot"] = sys.modules["__main__"]
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})  # as the interpreter fills it
    sys.modules["__main__"] = main


def _run_script(path: str) -> None:
    """Run a file as `python path` does, in the real `__main__`, so that pickles and spawned children find it."""
    from importlib.machinery import SourceFileLoader

    if os.path.isdir(path) or path.endswith((".zip", ".pyz")):
        import runpy

        # A directory or archive with a __main__: the one form python runs through runpy itself.
        sys.path.insert(0, os.path.abspath(path))
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        return
    if not sys.flags.safe_path:
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    absolute = os.path.join(os.getcwd(), path)  # not normalised, as python leaves it
    try:
        with open(path, "rb") as f:
            source = f.read()
    except OSError as error:
        sys.stderr.write(f"{sys.executable}: can't open file {absolute!r}: [Errno {error.errno}] {error.strerror}\n")
        sys.exit(2)
    main = sys.modules["__main__"].__dict__
    main.update(
        __loader__=SourceFileLoader("__main__", absolute),
        __spec__=None,
        __file__=absolute,
        __cached__=None,
    )
    exec(compile(source, absolute, "exec", dont_inherit=True), main)


def _run_module(name: str) -> None:
    import runpy

    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    runpy._run_module_as_main(name, alter_argv=True)  # type: ignore[attr-defined]  # what python -m calls


def _run_path(path: str) -> None:
    import runpy

    runpy.run_path(path, run_name="__main__")


def _boot() -> None:
    mode = sys.argv[1]
    del sys.argv[:2]
    _die_with_parent()
    environ = os.environ
    if environ.get("KGTRUN_CPUS"):
        _use_cores(environ["KGTRUN_CPUS"])
    if environ.get("KGTRUN_STACK_FILE"):
        _stacks_on_demand(environ["KGTRUN_STACK_FILE"])
    if environ.get("KGTRUN_DROP_IN", "1") not in ("0", "false", "no", "off"):
        _import_ours("kgtrun.drop_in").install(_ROOT)
    sys.excepthook = _excepthook
    _make_room()
    run = {"script": _run_script, "module": _run_module, "path": _run_path}[mode]
    try:
        run(sys.argv[0])
    except (Exception, SystemExit) as error:
        import time

        if not isinstance(error, SystemExit) or error.code not in (None, 0):
            _record(error, time.monotonic())
        raise


if __name__ == "__main__":
    _boot()
