from __future__ import annotations

import time

from launcher.logs import Follower, matching


def wait_until(condition, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_only_whole_lines_are_printed_and_the_rest_at_the_end(tmp_path):
    shown: list[str] = []
    follower = Follower()
    path = tmp_path / "out"
    follower.follow(path, "h:12: ", shown.append)
    with open(path, "w") as f:
        f.write("half a ")
        f.flush()
        time.sleep(0.2)
        assert shown == []
        f.write("line\nand more")
        f.flush()
        wait_until(lambda: shown)
    follower.stop()
    assert "".join(shown) == "h:12: half a line\nh:12: and more\n"


def test_of_a_redrawn_progress_bar_the_last_state_is_shown(tmp_path):
    shown: list[str] = []
    follower = Follower()
    (tmp_path / "out").write_bytes(b"10%\r20%\r30%\nwindows\r\n")
    follower.follow(tmp_path / "out", "", shown.append)
    follower.stop()
    assert "".join(shown) == "30%\nwindows\n"


def test_filters_copy_matching_lines(tmp_path):
    follower = Follower()
    (tmp_path / "out").write_text("apple\npear\norange\n")
    follower.follow(tmp_path / "out", "0: ", matching(["apple", "orange"], tmp_path / "filtered"))
    follower.stop()
    assert (tmp_path / "filtered").read_text() == "0: apple\n0: orange\n"


def test_a_truncated_file_is_followed_from_its_new_beginning(tmp_path):
    shown: list[str] = []
    follower = Follower()
    path = tmp_path / "out"
    path.write_text("a long first line\n")
    follower.follow(path, "", shown.append)
    wait_until(lambda: shown)
    path.write_text("new\n")
    wait_until(lambda: len(shown) == 2)
    follower.stop()
    assert shown[1] == "new\n"
