from __future__ import annotations

import socket

from launcher import links
from launcher.links import Links, bound, leaves_host


def connected():
    """Both ends of a TCP connection between two addresses, as if between two hosts."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname(), source_address=("127.0.0.2", 0))
    accepted, _ = server.accept()
    return server, client, accepted


def test_connections_that_leave_the_host_are_bounded_and_others_left_alone():
    server, client, accepted = connected()
    near = socket.create_connection(server.getsockname())
    a, b = socket.socketpair()
    with server, client, accepted, near, a, b:
        assert leaves_host(client) and leaves_host(accepted)
        assert not any(map(leaves_host, (server, near, a)))
        made = Links(0)
        made._timeout_s = 8.0
        made.look()
        for one in (client, accepted):
            assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 8000
            assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        assert near.fileno() >= 0 and client.send(b"x") == 1 and accepted.recv(1) == b"x"


def test_a_short_limit_still_probes():
    with socket.socket() as one:
        bound(one, 1.0)
        assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 1


def test_the_thread_finds_new_connections_and_ends(monkeypatch):
    import time

    monkeypatch.setattr(links, "_LOOK_S", 0.01)
    made = Links(5.0)
    server, client, accepted = connected()
    with server, client, accepted:
        deadline = time.monotonic() + 20
        while client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) != 5000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    made.close()
    assert not made._thread.is_alive()
