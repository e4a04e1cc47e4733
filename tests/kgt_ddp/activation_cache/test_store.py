"""A record comes back as it was, or not at all."""

from __future__ import annotations

import errno
import functools
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import xxhash

from kgt_ddp.activation_cache import store
from kgt_ddp.activation_cache.folder import SUFFIX, CacheFolder
from kgt_ddp.activation_cache.store import HEADER_BYTES, ForeignFileError, stride_of
from kgt_ddp.activation_cache.writer import Writer

DIGEST = "ab" * 16
SIZE = 1000
BUDGET = 4 << 20
KILLS = int(os.environ.get("KGTRUN_TEST_KILLS", "8"))


def key(i):
    return xxhash.xxh3_128_digest(i.to_bytes(8, "little"))


@functools.cache
def record(i, size=SIZE):
    return np.random.default_rng(i).integers(0, 256, size, np.uint8)


def read(table, i, size=SIZE):
    buffer = np.zeros(size, np.uint8)
    return buffer if table.get(key(i), [memoryview(buffer)]) else None


def put(table, i, size=SIZE):
    return table.put(key(i), [memoryview(record(i, size))])


@pytest.fixture
def folder(tmp_path):
    return CacheFolder(tmp_path / "cache", BUDGET)


@pytest.fixture
def opened(folder):
    tables = []

    def open_(digest=DIGEST, slot_bytes=SIZE, where=folder):
        table, writable = where.open(digest, slot_bytes)
        tables.append(table)
        return table, writable

    yield open_
    for table in tables:
        table.close()


def path_of(folder, digest=DIGEST):
    return folder.path / f"{digest}{SUFFIX}"


def test_records_come_back_from_this_process_and_after_a_restart(opened):
    table, writable = opened()
    assert writable
    for i in range(200):
        assert put(table, i) > SIZE
    table.close()
    again, _ = opened()
    assert all(np.array_equal(read(again, i), record(i)) for i in range(200))
    assert all(again.has(key(i)) for i in range(200))
    assert read(again, 201) is None
    assert not again.has(key(201))
    assert again.corrupt == 0


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 5000])
def test_long_records_are_spread_over_slots(opened, size):
    table, _ = opened()
    put(table, 1, size)
    assert np.array_equal(read(table, 1, size), record(1, size))
    assert read(table, 1, size + 1) is None


def test_a_record_may_be_in_pieces(opened):
    table, _ = opened()
    a, b = record(1, 700), record(2, 800)
    table.put(key(1), [memoryview(a), memoryview(b)])
    one = np.zeros(1500, np.uint8)
    assert table.get(key(1), [memoryview(one)])
    assert np.array_equal(one, np.concatenate([a, b]))


def test_a_full_table_keeps_most_of_what_it_has(folder, opened):
    where = CacheFolder(folder.path, HEADER_BYTES + 64 * stride_of(SIZE))
    table, _ = opened(where=where)
    for _ in range(4):
        for i in range(200):
            if read(table, i) is None:
                put(table, i)
    kept = sum(read(table, i) is not None for i in range(200))
    assert 48 <= kept <= 64
    assert table.replaced > 0
    assert table.given_up > 10 * table.replaced


def test_a_full_table_keeps_records_of_several_parts_whole(folder, opened):
    """Twice as many as there is room for, in cycles: none pushes out a part of another, and none leaves parts of itself."""
    size = 4 * SIZE
    table, _ = opened(where=CacheFolder(folder.path, HEADER_BYTES + 512 * stride_of(SIZE)))
    rates = []
    for _ in range(8):
        there = [read(table, i, size) is not None for i in range(256)]
        rates.append(sum(there) / 256)
        for i in (i for i in range(256) if not there[i]):
            put(table, i, size)
    assert rates[1] > 0.4
    assert rates[1:] == [rates[1]] * 7


@pytest.mark.parametrize("offset", [0, 3, 16, 20, 24, 26, 28, 30, 40, 900])
def test_a_flipped_byte_anywhere_in_a_slot_is_a_miss(folder, opened, offset):
    table, _ = opened()
    put(table, 7)
    data = bytearray(path_of(folder).read_bytes())
    start = data.index(key(7), HEADER_BYTES)
    data[start + offset] ^= 0x10
    path_of(folder).write_bytes(data)
    assert read(table, 7) is None


def test_a_truncated_file_is_misses_and_is_filled_again(folder, opened, caplog):
    table, _ = opened()
    for i in range(50):
        put(table, i)
    os.truncate(path_of(folder), HEADER_BYTES + 10)
    assert all(read(table, i) is None for i in range(50))
    table.close()
    again, writable = opened()
    assert writable
    assert "cut short" in caplog.text
    assert all(read(again, i) is None for i in range(50))
    put(again, 3)
    assert np.array_equal(read(again, 3), record(3))


@pytest.mark.parametrize("content", [b"", b"not ours", b"\0" * 9000, os.urandom(9000)])
def test_a_foreign_file_is_left_alone(folder, content):
    folder.path.mkdir()
    path_of(folder).write_bytes(content)
    with pytest.raises(ForeignFileError, match="not a cache file"):
        folder.open(DIGEST, SIZE)
    assert path_of(folder).read_bytes() == content


def test_a_damaged_header_and_another_files_header(folder, opened):
    table, _ = opened()
    put(table, 1)
    data = path_of(folder).read_bytes()
    path_of(folder, "cd" * 16).write_bytes(data)
    with pytest.raises(ForeignFileError, match="another model"):
        folder.open("cd" * 16, SIZE)
    table.close()
    path_of(folder).write_bytes(data.replace(b'"num_slots": ', b'"num_slots": 9', 1))
    with pytest.raises(ForeignFileError, match="damaged"):
        folder.open(DIGEST, SIZE)


def test_records_copied_into_another_prefixs_file_do_not_pass(folder, opened):
    one, _ = opened()
    for i in range(20):
        put(one, i)
    other, _ = opened("cd" * 16)
    data = path_of(folder).read_bytes()[HEADER_BYTES : HEADER_BYTES + 200 * stride_of(SIZE)]
    with path_of(folder, "cd" * 16).open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(data)
    # Both tables may differ in their number of slots; what counts is that nothing of the first passes in the second.
    assert all(read(other, i) is None for i in range(20))


def test_a_read_only_file_is_read(folder, opened, monkeypatch):
    table, _ = opened()
    put(table, 1)
    table.close()
    real = os.open

    def refusing(path, flags, *args, **kwargs):
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "read-only file system")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    again, writable = opened()
    assert not writable
    assert np.array_equal(read(again, 1), record(1))


def test_a_folder_that_cannot_be_made_or_is_another_users(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        CacheFolder(tmp_path / "file" / "cache", BUDGET).open(DIGEST, SIZE)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="another user"):
        CacheFolder(tmp_path / "cache", BUDGET).open(DIGEST, SIZE)


def test_an_existing_folder_of_another_user_is_not_used(folder, opened, monkeypatch):
    table, _ = opened()
    table.close()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="another user"):
        folder.open(DIGEST, SIZE)


@pytest.mark.skipif(os.getuid() != 0, reason="giving a file to another user takes root")
def test_a_file_of_another_user_is_left_alone(folder, opened):
    table, _ = opened()
    table.close()
    os.chown(path_of(folder), 12345, -1)
    with pytest.raises(ForeignFileError, match="another user"):
        folder.open(DIGEST, SIZE)


def test_a_file_that_is_deleted_while_it_is_opened_is_made_anew(folder, opened, monkeypatch):
    """By another job that needs room, before the file is locked."""
    table, _ = opened()
    put(table, 1)
    table.close()
    real, deleted = os.open, []

    def slow(path, *args, **kwargs):
        fd = real(path, *args, **kwargs)
        if path == path_of(folder) and not deleted:
            deleted.append(path)
            assert CacheFolder(folder.path)._delete(path)
        return fd

    monkeypatch.setattr(os, "open", slow)
    again, writable = opened()
    assert writable and read(again, 1) is None
    assert os.fstat(again._fd).st_ino == path_of(folder).stat().st_ino, "not the one that nobody else can find"


def test_a_file_that_is_being_made_is_not_deleted(folder, opened, monkeypatch):
    """Nor emptied through its temporary name once it has its own."""
    other, tried = CacheFolder(folder.path), []

    def delete_all():
        tried.extend(other._delete(file) for file in folder.path.glob(".new-*"))

    link, unlink = os.link, os.unlink
    monkeypatch.setattr(os, "link", lambda *args: (delete_all(), link(*args), delete_all()))
    monkeypatch.setattr(os, "unlink", lambda path: (delete_all(), unlink(path)))
    table, _ = opened()
    monkeypatch.undo()
    assert tried == [False] * 3
    put(table, 1)
    assert read(table, 1) is not None


def test_of_a_file_with_two_names_one_is_deleted_and_the_other_kept(folder, opened):
    """A job that was killed while it made the file has left its temporary name."""
    table, _ = opened()
    put(table, 1)
    table.close()
    os.link(path_of(folder), folder.path / f".new-x{SUFFIX}")
    assert folder._delete(folder.path / f".new-x{SUFFIX}")
    again, _ = opened()
    assert read(again, 1) is not None


def test_the_folder_is_private(folder, opened):
    opened()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_the_budget_holds_and_unused_files_go_first(folder, opened):
    old, _ = opened("01" * 16, slot_bytes=100_000)
    for i in range(40):
        put(old, i, 90_000)
    old.close()
    os.utime(path_of(folder, "01" * 16), (1, 1))
    held, _ = opened("02" * 16, slot_bytes=100_000)
    assert not path_of(folder, "01" * 16).exists(), "the unused file had most of the budget"
    for i in range(40):
        put(held, i, 90_000)
    with pytest.raises(OSError, match="no room"):
        CacheFolder(folder.path, 1 << 20).open("03" * 16, SIZE)
    assert path_of(folder, "02" * 16).exists(), "a file in use is not deleted"
    assert sum(f.stat().st_blocks * 512 for f in folder.path.iterdir()) <= BUDGET + (1 << 20)


def test_a_forked_worker_holds_neither_the_file_nor_its_room(folder, opened):
    """A DataLoader's workers are forked with every descriptor there is, and may live as long as the job."""
    old, _ = opened("01" * 16, slot_bytes=100_000)
    for i in range(40):
        put(old, i, 90_000)
    awake, asleep = os.pipe()
    worker = os.fork()
    if not worker:
        os.close(asleep)
        os.read(awake, 1)
        os._exit(0)
    try:
        inode = os.dup(old._fd)
        old.close()
        folder.discard("01" * 16)
        assert not path_of(folder, "01" * 16).exists()
        assert os.fstat(inode).st_blocks == 0
        os.close(inode)
        new, _ = opened("02" * 16)
        assert new.capacity_bytes > BUDGET * 0.9
    finally:
        os.close(asleep)
        os.close(awake)
        os.waitpid(worker, 0)


def test_deleting_room_spares_files_that_are_not_ours(folder, opened):
    folder.path.mkdir()
    foreign = folder.path / f"thesis{SUFFIX}"
    foreign.write_bytes(b"x" * BUDGET)
    with pytest.raises(OSError, match="no room"):
        folder.open(DIGEST, SIZE)
    assert foreign.exists()


def test_without_a_budget_only_a_share_of_the_free_space_is_taken(tmp_path, monkeypatch):
    folder = CacheFolder(tmp_path)
    disk = os.statvfs(tmp_path)
    assert folder.budget() <= 0.26 * disk.f_bavail * disk.f_frsize
    full = os.statvfs_result((4096, 4096, 1000, 40, 40, 1000, 1000, 1000, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    assert not folder.may_grow(), "the last of the disk is never taken"


def test_a_full_disk_ends_writing_with_one_line(opened, monkeypatch, caplog):
    table, _ = opened()
    writer = Writer(lambda: True)
    writer.add(table, [(key(i), [memoryview(record(i))]) for i in range(3)])
    assert writer.drain()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, "pwritev", full)
    for i in range(3, 9):
        writer.add(table, [(key(i), [memoryview(record(i))])])
    assert writer.drain()
    assert caplog.text.count("nothing more is written") == 1
    assert [read(table, i) is not None for i in range(9)] == [True] * 3 + [False] * 6


def test_writing_goes_on_when_it_is_resumed(opened):
    table, _ = opened()
    room = [False]
    writer = Writer(lambda: room[0])
    one = [(key(1), [memoryview(record(1))])]
    assert writer.add(table, one) and writer.drain() and not writer.add(table, one)
    room[0] = True
    writer.resume()
    assert writer.add(table, one) and writer.drain() and read(table, 1) is not None


def test_a_file_size_limit_is_no_crash(opened):
    """A real failure of the kernel, in place of a full disk: writes past the limit fail or come out short."""
    table, _ = opened(slot_bytes=20_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (table.capacity_bytes // 2, hard))
    try:
        failures = 0
        for i in range(100):
            try:
                put(table, i, 19_000)
            except OSError:
                failures += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert 15 < failures < 85
    for i in range(100):
        found = read(table, i, 19_000)
        assert found is None or np.array_equal(found, record(i, 19_000))


def test_a_writer_that_is_behind_drops_and_never_waits(opened):
    table, _ = opened()
    disk = threading.Event()
    writer = Writer(lambda: disk.wait(30), limit_bytes=5 * SIZE)
    taken = [writer.add(table, [(key(i), [memoryview(record(i))])]) for i in range(50)]
    assert not disk.is_set(), "all were handed over while the disk stood still"
    assert sum(taken) == 5
    disk.set()
    assert writer.drain()
    assert all(read(table, i) is not None for i in range(5))


def test_one_batch_is_taken_however_large_it_is(opened):
    """Or all batches of a model with large outputs would be dropped, with an idle disk."""
    table, _ = opened()
    disk = threading.Event()
    writer = Writer(lambda: disk.wait(30), limit_bytes=5 * SIZE)
    batch = [(key(i), [memoryview(record(i))]) for i in range(20)]
    assert [writer.add(table, batch), writer.add(table, batch[:1])] == [True, False]
    disk.set()
    assert writer.drain()
    assert all(read(table, i) is not None for i in range(20))
    assert writer.add(table, batch) and writer.drain()


def test_the_budget_ends_writing_in_the_middle_of_a_batch(opened):
    table, _ = opened(slot_bytes=100_000)
    allowed = iter([True, True, False])
    writer = Writer(lambda: next(allowed))
    writer.add(table, [(key(i), [memoryview(record(i, 90_000))]) for i in range(60)])
    assert writer.drain() and writer.stopped is not None
    assert 2 << 20 <= writer.num_bytes < 2.2 * (1 << 20)


def test_closing_while_a_writer_works_loses_records_only(opened, tmp_path):
    table, _ = opened()
    writer = Writer(lambda: True)
    for i in range(200):
        writer.add(table, [(key(i), [memoryview(record(i))])])
    table.close()
    bystander = tmp_path / "bystander"
    with bystander.open("w+b") as file:  # gets the descriptor that the table had
        assert writer.drain()
        file.flush()
    assert bystander.read_bytes() == b""
    assert writer.stopped is None


WRITERS = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from kgt_ddp.activation_cache.folder import CacheFolder
    from tests.kgt_ddp.activation_cache.test_store import BUDGET, DIGEST, key, record

    def write():
        table, _ = CacheFolder(Path(sys.argv[1]), BUDGET).open(DIGEST, 200_000)
        while True:
            for i in range(12):
                table.put(key(i), [records[i]])

    records = [memoryview(record(i, 190_000)) for i in range(12)]
    for line in sys.stdin:
        children = []
        for _ in range(2):
            children.append(os.fork())
            if not children[-1]:
                signal.alarm(30)
                write()
        print(*children, flush=True)
        sys.stdin.readline()
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        print("killed", flush=True)
    """
)


@pytest.mark.integration
def test_two_processes_write_and_are_killed_in_mid_write(folder, opened):
    """Neither a kill nor the other process's writes can show: what is read is a whole record or nothing."""
    table, _ = opened(slot_bytes=200_000)

    def whole():
        found = [read(table, i, 190_000) for i in range(12)]
        assert all(f is None or np.array_equal(f, record(i, 190_000)) for i, f in enumerate(found))
        return sum(f is not None for f in found)

    command = [sys.executable, "-c", WRITERS, str(folder.path)]
    whole_records = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        try:
            for attempt in range(KILLS):
                print("start", file=parent.stdin, flush=True)
                assert parent.stdout.readline().strip()
                until = time.monotonic() + 0.05 + 0.013 * (attempt % 8)
                while time.monotonic() < until:
                    whole()
                print("kill", file=parent.stdin, flush=True)
                assert parent.stdout.readline() == "killed\n"
                whole_records += whole()
        finally:
            parent.stdin.close()
            parent.wait(30)
    assert whole_records, "something was written"
