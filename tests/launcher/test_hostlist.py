from __future__ import annotations

import pytest

from launcher.hostlist import expand_counts, expand_hosts


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("h0", "h0"),
        ("h[0-1]", "h0 h1"),
        ("h[0-3,7]", "h0 h1 h2 h3 h7"),
        ("a[01-03]b[1-2]", "a01b1 a01b2 a02b1 a02b2 a03b1 a03b2"),
        ("gpu-[08-11],login,c[1,3]-ib", "gpu-08 gpu-09 gpu-10 gpu-11 login c1-ib c3-ib"),
        ("r[0-1]n[9-10,12]", "r0n9 r0n10 r0n12 r1n9 r1n10 r1n12"),
        ("node[099-101]", "node099 node100 node101"),
        (" a, b ", "a b"),
        ("n1.cluster.example", "n1.cluster.example"),
    ],
)
def test_host_lists(text, hosts):
    assert expand_hosts(text) == tuple(hosts.split())


@pytest.mark.parametrize("text", ["", ",", "h[0-", "h0]", "h[a-b]", "h[3-1]", "h[]", "a[b[1-2]]", "h[0-99999999]"])
def test_what_is_no_host_list_is_refused_with_its_text(text):
    with pytest.raises(ValueError, match="host list"):
        expand_hosts(text)


@pytest.mark.parametrize(("text", "counts"), [("2(x3),1", (2, 2, 2, 1)), ("1", (1,)), ("4,2(x2)", (4, 2, 2))])
def test_counts(text, counts):
    assert expand_counts(text) == counts


@pytest.mark.parametrize("text", ["", "2(x3", "x2", "2(3)", "2,,1", "1(x999999)"])
def test_what_is_no_list_of_counts_is_refused(text):
    with pytest.raises(ValueError, match="list of counts"):
        expand_counts(text)
