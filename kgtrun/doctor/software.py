"""Versions and accelerators."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

from kgtrun.doctor.finding import Finding
from kgtrun.version import VERSION

_TESTED_TORCH = ("2.13", "2.14")
_OPTIONAL = {"rich": "a live line on terminals", "matplotlib": "plots in reports", "torchao": "int8 references"}


def versions() -> list[Finding]:
    """kgtrun, Python, kernel, torch and its backends, optional packages."""
    found = [
        Finding("kgtrun", VERSION),
        Finding("python", f"{platform.python_version()} at {sys.executable}"),
        Finding("kernel", platform.release() + _without_pidfd()),
    ]
    try:
        import torch
    except ImportError as error:
        return [*found, Finding("torch", f"cannot be imported: {error}", "install torch 2.13")]
    untested = (
        "" if torch.__version__.startswith(_TESTED_TORCH) else "tested with 2.13: run the tests before relying on it"
    )
    found.append(Finding("torch", torch.__version__, untested))
    import torch.distributed as dist

    backends = [
        name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there
    ]
    found.append(
        Finding("backends", ", ".join(backends) or "none", "" if backends else "install a torch with gloo or nccl")
    )
    for package, use in _OPTIONAL.items():
        try:
            found.append(Finding(package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append(Finding(package, f"not installed (optional: {use})"))
    return found


def _without_pidfd() -> str:
    """What is done where there are no pidfds: some builds of Python lack the call, kernels before 5.3 refuse it."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        return f", without pidfd ({error}): one thread for each rank waits for its end"
    return ""


def accelerators() -> list[Finding]:
    """GPUs that torch sees."""
    import torch

    if not torch.accelerator.is_available():
        return [Finding("accelerators", "none: ranks train on the CPU with gloo")]
    kind = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count()
    names = {torch.cuda.get_device_name(i) for i in range(count)} if torch.cuda.is_available() else set()
    return [
        Finding("accelerators", f"{count} × {', '.join(sorted(names)) or kind}; --nproc-per-node gpu starts {count}")
    ]
