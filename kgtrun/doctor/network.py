"""Name resolution, interfaces and ports: what decides whether several nodes find each other."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Collection, Mapping

import psutil

from kgtrun.doctor.finding import Finding

_DEFAULT_PORT = 29500
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def addresses_by_interface() -> dict[str, list[str]]:
    """IPv4 addresses of interfaces that are up."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: [a.address for a in addresses if a.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
    }


def resolve(name: str) -> list[str]:
    """IPv4 addresses of a name, none when it does not resolve."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)})
    except OSError:
        return []


def judge_hostname(name: str, resolved: list[str], interfaces: Mapping[str, list[str]]) -> list[Finding]:
    """Whether other nodes could reach this one by what its name means here."""
    own = {address for addresses in interfaces.values() for address in addresses}
    outside = sorted(address for address in own if not address.startswith("127."))
    if not resolved:
        return [
            Finding(
                "hostname",
                f"{name} does not resolve",
                "several nodes: on one of them --rdzv-conf is_host=1 and 0 on the others, and on each --local-addr "
                "ADDRESS and GLOO_SOCKET_IFNAME; or put the names into /etc/hosts everywhere",
                serious=False,
            )
        ]
    if all(address.startswith("127.") for address in resolved) and outside:
        return [
            Finding(
                "hostname",
                f"{name} is {', '.join(resolved)} here, a loopback address that other nodes cannot reach",
                f"several nodes: map {name} to {outside[0]} in /etc/hosts, or use the name as endpoint (an address as "
                "endpoint hangs) with GLOO_SOCKET_IFNAME set; one node: nothing to do",
                serious=False,
            )
        ]
    foreign = [address for address in resolved if address not in own]
    if foreign:
        return [
            Finding(
                "hostname",
                f"{name} is {', '.join(foreign)}, which is no address of this node",
                "several nodes: --local-addr with one of " + (", ".join(outside) or "its addresses"),
                serious=False,
            )
        ]
    return [Finding("hostname", f"{name} is {', '.join(resolved)}")]


def hostname() -> list[Finding]:
    name = socket.gethostname()
    return judge_hostname(name, resolve(name), addresses_by_interface())


def names_not_up(variable: str, chosen: str, up: Collection[str]) -> list[str]:
    """Names in one of the variables that are no interface; for NCCL, all of them if none fits.

    To NCCL they are prefixes, or names after a leading =, of which one will do; after a leading ^ what it must not use.
    """
    if variable != "NCCL_SOCKET_IFNAME":
        return [name for name in chosen.split(",") if name not in up]
    if chosen.startswith("^"):
        return []
    names = chosen.removeprefix("=").split(",")
    fits = str.__eq__ if chosen.startswith("=") else str.startswith
    return [] if any(fits(interface, name) for interface in up for name in names) else names


def interfaces() -> list[Finding]:
    """Interfaces that are up, and the one gloo takes: that of the hostname's address unless told otherwise."""
    by_interface = addresses_by_interface()
    found = []
    for variable in _INTERFACE_VARIABLES:
        chosen = os.environ.get(variable)
        if chosen:
            missing = names_not_up(variable, chosen, by_interface)
            cure = f"{', '.join(missing)} is not up here: one of {', '.join(by_interface)}" if missing else ""
            found.append(Finding("interfaces", f"{variable}={chosen}", cure))
    resolved = resolve(socket.gethostname())
    for name, addresses in by_interface.items():
        used = " (used by gloo)" if set(addresses) & set(resolved) else ""
        found.append(Finding("interfaces", f"{name}: {', '.join(addresses) or 'no IPv4 address'}{used}"))
    return found


def ports() -> list[Finding]:
    """Whether the static rendezvous' default port is free; one node alone takes any free port and needs none."""
    with socket.socket() as probe:
        try:
            probe.bind(("", _DEFAULT_PORT))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            words = f"{_DEFAULT_PORT} is taken: by another run on this node, perhaps"
            return [
                Finding("ports", words, "several nodes: --master-port with another one, the same on all nodes", False)
            ]
    return [Finding("ports", f"{_DEFAULT_PORT}, the default of several nodes' rendezvous, is free")]
