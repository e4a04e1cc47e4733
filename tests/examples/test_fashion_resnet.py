from __future__ import annotations

import os
from pathlib import Path

import fashion_resnet
import pytest
import torch

CPU = torch.device("cpu")
REAL = Path(os.environ.get("KGTRUN_FASHION_MNIST_DIR") or fashion_resnet.DATA)
"""Read on import: inside a test no variable of kgtrun is set."""


def test_idx_files_are_read_gzipped_and_plain(tiny_fashion: Path) -> None:
    packed = fashion_resnet.read_idx(tiny_fashion, "train-images-idx3-ubyte")
    plain = fashion_resnet.read_idx(tiny_fashion, "t10k-labels-idx1-ubyte")
    assert (packed.shape, packed.dtype) == ((256, 28, 28), torch.uint8)
    assert plain.shape == (101,)
    assert packed.max() > 200


def test_missing_data_names_the_script_that_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="scripts/data"):
        fashion_resnet.read_idx(tmp_path, "train-images-idx3-ubyte")


def test_a_file_that_is_not_idx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"something else")
    with pytest.raises(SystemExit, match="not an IDX file"):
        fashion_resnet.read_idx(tmp_path, "train-images-idx3-ubyte")


def test_the_first_images_are_loaded_normalised(tiny_fashion: Path) -> None:
    images, labels = fashion_resnet.load(tiny_fashion, "train", 32, CPU).tensors
    raw = fashion_resnet.read_idx(tiny_fashion, "train-images-idx3-ubyte")[:32]
    assert images.shape == (32, 1, 28, 28)
    assert labels.dtype == torch.int64
    torch.testing.assert_close(images[:, 0] * 0.3530 + 0.2860, raw / 255)


def test_more_images_than_there_are_is_an_error(tiny_fashion: Path) -> None:
    with pytest.raises(SystemExit, match="257 images of 'train' asked for; there are 256"):
        fashion_resnet.load(tiny_fashion, "train", 257, CPU)


def test_about_half_of_the_images_are_flipped_and_none_changed_otherwise() -> None:
    images = torch.arange(400.0).reshape(100, 1, 2, 2)
    out = fashion_resnet.flip_some(images, torch.Generator().manual_seed(0))
    same = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 30 < mirrored.sum() < 70


def test_the_report_says_what_was_saved() -> None:
    freezing = {
        "active": True,
        "num_blocks": 10,
        "freezes": [{"step": 40, "frontier": 4}, {"step": 80, "frontier": 8}],
        "reduced_bytes": 30_000_000,
        "dropped_bytes": 10_000_000,
    }
    text = fashion_resnet.report(
        {
            "accuracy": 0.9137,
            "train_wall_s": 100.0,
            "train_cpu_s": 190.0,
            "world_size": 2,
            "steps": 160,
            "freezing": freezing,
        }
    )
    assert "91.37%" in text
    assert "4 from step 40, 8 from step 80 (of 10 blocks, 160 steps)" in text
    assert "30.0 MB reduced, 10.0 MB left out (25%)" in text
    assert "50% of them left out" in text
    assert "100.0 s, 190.0 CPU seconds over 2 ranks" in text


@pytest.mark.skipif(not REAL.is_dir(), reason="Fashion-MNIST is not here; scripts/data fetches it")
def test_the_real_data_has_the_published_size_and_statistics() -> None:
    images, labels = fashion_resnet.load(REAL, "train", 60_000, CPU).tensors
    assert labels.bincount().tolist() == [6000] * 10
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3
    assert len(fashion_resnet.read_idx(REAL, "t10k-labels-idx1-ubyte")) == 10_000
