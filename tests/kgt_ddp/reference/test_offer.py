"""An offer that cannot be made leaves nothing open."""

from __future__ import annotations

import os

import pytest
from torch import nn

from kgt_ddp.reference import offer
from kgt_ddp.reference.arena import memory_file
from kgt_ddp.reference.offer import Offer


def make(module: nn.Module) -> Offer:
    return Offer.of(module, ["0"], lags=(1,), pairing="probe", num_slots=2)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_slots_hold_every_parameter_and_go_with_it() -> None:
    before = open_files()
    made = make(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    assert [set(slot) for slot in made.slots] == [set(made.layout.map(made.slot_fds[0]))] * 2
    assert "1.running_mean" in made.slots[0]
    made.close()
    del made  # its tensors map the memory, and a map holds its file
    assert open_files() == before


def test_too_little_memory_for_the_second_slot_gives_the_first_back(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def first_only(name: str, num_bytes: int) -> int:
        if taken:
            raise OSError(12, "Cannot allocate memory")
        taken.append(memory_file(name, num_bytes))
        return taken[0]

    monkeypatch.setattr(offer, "memory_file", first_only)
    before = open_files()
    with pytest.raises(OSError, match="no shared memory for a reference: .*allocate"):
        make(nn.Sequential(nn.Linear(2, 3)))
    assert taken and open_files() == before
