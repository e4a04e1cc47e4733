from __future__ import annotations

import errno
import json
import os
import socket

import pytest

from kgtrun import doctor
from kgtrun.doctor import network, software
from kgtrun.doctor.finding import Finding

INTERFACES = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.5"], "ib0": ["10.1.0.5"]}


@pytest.mark.parametrize(
    ("resolved", "words", "cure"),
    [
        (["10.0.0.5"], "h0 is 10.0.0.5", ""),
        (["127.0.1.1"], "loopback", "10.0.0.5"),
        ([], "does not resolve", "is_host=1"),
        (["10.9.9.9"], "no address of this node", "10.0.0.5, 10.1.0.5"),
    ],
)
def test_traps_of_name_resolution(resolved, words, cure):
    (finding,) = network.judge_hostname("h0", resolved, INTERFACES)
    assert words in finding.words
    assert cure in finding.cure and bool(cure) == bool(finding.cure)


def test_an_interface_that_is_not_up_is_a_problem(monkeypatch):
    monkeypatch.setattr(network, "addresses_by_interface", lambda: INTERFACES)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert "eth7 is not up" in network.interfaces()[0].cure
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert not network.interfaces()[0].cure


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ("^docker,lo", True),
        ("^=eth7", True),
        ("eth", True),
        ("en,ib", True),
        ("=ib0", True),
        ("=ib", False),
        ("en", False),
    ],
)
def test_nccl_takes_prefixes_exact_names_and_exclusions_and_gloo_names_alone(monkeypatch, chosen, found):
    monkeypatch.setattr(network, "addresses_by_interface", lambda: INTERFACES)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", chosen)
    assert bool(network.interfaces()[0].cure) != found
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
    assert network.interfaces()[0].cure


def test_a_machine_without_pidfds_is_no_problem(monkeypatch):
    def words() -> str:
        (kernel,) = (finding for finding in software.versions() if finding.topic == "kernel")
        assert not kernel.cure
        return kernel.words

    def refused(pid):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "pidfd_open", refused, raising=False)
    assert "Function not implemented" in words() and "one thread for each rank" in words()
    monkeypatch.delattr(os, "pidfd_open")
    assert "one thread for each rank" in words()


def test_a_taken_port_is_a_problem():
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        import unittest.mock

        with unittest.mock.patch.object(network, "_DEFAULT_PORT", holder.getsockname()[1]):
            assert "--master-port" in network.ports()[0].cure


def test_a_check_that_breaks_is_said_and_the_others_go_on(monkeypatch, capsys):
    def broken():
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "CHECKS", (broken, lambda: [Finding("x", "fine")]))
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "could not be checked" in out and "fine" in out


def test_problems_have_a_cure_and_give_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [Finding("port", "taken", "another")],))
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out) == [
        {"topic": "port", "words": "taken", "cure": "another", "serious": True}
    ]
    with pytest.raises(ValueError, match="No such option"):
        doctor.main(["--nope"])


def test_this_machine_is_examined():
    topics = {finding.topic for finding in doctor.examine()}
    assert {"torch", "cores", "memory", "hostname", "interfaces", "ports", "cache"} <= topics
