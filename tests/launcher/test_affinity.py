from __future__ import annotations

import pytest

from launcher.affinity import share
from launcher.topology import Cpu, Topology, cgroup_quota, format_cpus, parse_cpus, read_topology


def machine(num_cores: int, *, siblings: int = 1, nodes: int = 1, quota: float | None = None) -> Topology:
    """Cores numbered as Linux does: first siblings first."""
    per_node = num_cores // nodes
    cpus = [
        Cpu(core // per_node, core // per_node, core, core + sibling * num_cores)
        for core in range(num_cores)
        for sibling in range(siblings)
    ]
    return Topology(cpus=tuple(sorted(cpus)), quota=quota)


def test_plenty_of_cores_are_split_in_numa_order_and_references_get_the_last():
    found = share(machine(16, nodes=2), num_ranks=2, num_sidecars=1)
    assert found.ranks == (frozenset(range(7)), frozenset(range(8, 15)))  # 7 is left: no rank is on both nodes
    assert found.sidecars == (frozenset({15}),)
    assert found.rank_threads == 6  # one of seven is left to the data loaders
    assert "7 cores each" in found.words and "references get 15" in found.words


@pytest.mark.parametrize(
    ("ranks", "refs", "runs", "references"),
    [
        (2, 2, ["0-6", "8-14"], ["7", "15"]),
        (4, 0, ["0-3", "4-7", "8-11", "12-15"], []),
        (3, 0, ["0-4", "5-9", "10-14"], []),  # no three runs of five fit into two nodes of eight
        (5, 1, ["0-2", "3-5", "6-8", "9-11", "12-14"], ["15"]),
    ],
)
def test_no_rank_is_on_two_nodes_where_that_fits(ranks, refs, runs, references):
    found = share(machine(16, nodes=2), num_ranks=ranks, num_sidecars=refs)
    assert [format_cpus(cores) for cores in found.ranks] == runs
    assert [format_cpus(cores) for cores in found.sidecars] == references


def test_siblings_stay_together_and_count_once():
    found = share(machine(4, siblings=2), num_ranks=2, num_sidecars=0)
    assert found.ranks == (frozenset({0, 4, 1, 5}), frozenset({2, 6, 3, 7}))
    assert found.rank_threads == 2


@pytest.mark.parametrize(
    ("cores", "ranks", "refs", "threads"), [(2, 2, 0, 1), (2, 1, 0, 0), (2, 2, 1, 1), (6, 2, 1, 2)]
)
def test_a_small_machine_is_not_pinned_but_threads_are_counted(cores, ranks, refs, threads):
    found = share(machine(cores), num_ranks=ranks, num_sidecars=refs)
    if cores < 2 * ranks + refs:
        assert found.ranks == (frozenset(),) * ranks
    assert found.rank_threads == threads


def test_under_a_quota_nothing_is_pinned():
    found = share(machine(64, quota=8.0), num_ranks=4, num_sidecars=0)
    assert not any(found.ranks) and found.rank_threads == 2 and "cgroup grants 8" in found.words


def test_cores_pinned_by_another_launch_are_left_alone():
    found = share(machine(16), num_ranks=2, num_sidecars=0, taken=range(8))
    assert not (found.ranks[0] | found.ranks[1]) & set(range(8))
    found = share(machine(16), num_ranks=2, num_sidecars=0, taken=range(14))
    assert not any(found.ranks)


def test_lists_of_cores():
    assert parse_cpus("0-3,8\n") == {0, 1, 2, 3, 8} and parse_cpus("") == frozenset()
    assert format_cpus({8, 0, 1, 2, 3, 5}) == "0-3,5,8"
    with pytest.raises(ValueError, match="0-3,8"):
        parse_cpus("a")


def write_tree(root, *, cores, nodes):
    """`cores`: logical number → (package, core). `nodes`: NUMA node → list of logical numbers."""
    for cpu, (package, core) in cores.items():
        place = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        place.mkdir(parents=True)
        (place / "physical_package_id").write_text(f"{package}\n")
        (place / "core_id").write_text(f"{core}\n")
    for node, cpus in nodes.items():
        place = root / f"sys/devices/system/node/node{node}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(cpus)


def test_ranks_keep_to_a_node_whose_cores_are_numbered_in_turn_with_the_others(tmp_path):
    """Two sockets of six cores and two threads, numbered as many servers do: even ones on the first, odd on the second."""
    cores = {cpu: (cpu % 2, cpu % 12 // 2) for cpu in range(24)}
    even, odd = (",".join(str(cpu) for cpu in range(first, 24, 2)) for first in (0, 1))
    write_tree(tmp_path, cores=cores, nodes={0: even, 1: odd})
    found = share(read_topology(allowed=range(24), root=tmp_path), num_ranks=4, num_sidecars=0)
    assert [sorted(its) for its in found.ranks] == [
        [0, 2, 4, 12, 14, 16],
        [6, 8, 10, 18, 20, 22],
        [1, 3, 5, 13, 15, 17],
        [7, 9, 11, 19, 21, 23],
    ]


def test_topology_and_quota_are_read_from_the_files_of_the_kernel(tmp_path):
    cores = {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1)}
    write_tree(tmp_path, cores=cores, nodes={0: "0-1", 1: "2-3"})
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (tmp_path / "sys/fs/cgroup/a/b").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/a/b/cpu.max").write_text("max 100000\n")
    (tmp_path / "sys/fs/cgroup/a/cpu.max").write_text("150000 100000\n")
    found = read_topology(allowed={0, 2, 3}, root=tmp_path)
    assert found.cpus == (Cpu(0, 0, 0, 0), Cpu(1, 1, 0, 2), Cpu(1, 1, 1, 3))
    assert found.quota == 1.5


def test_quota_of_cgroup_v1(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/job\n0::/\n")
    place = tmp_path / "sys/fs/cgroup/cpu/job"
    place.mkdir(parents=True)
    (place / "cpu.cfs_quota_us").write_text("200000\n")
    (place / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path) == 2.0
