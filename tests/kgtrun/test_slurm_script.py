from __future__ import annotations

import os
import stat
import subprocess

import pytest

from kgtrun.argv import read
from kgtrun.cli import main
from kgtrun.options import ALL
from kgtrun.slurm_script import SLURM, script


def text(line: str) -> str:
    return script(read(line.split(), {}, SLURM + ALL))


def test_a_job_of_several_nodes_is_ready_to_submit():
    made = text("--nnodes 2 --gpus-per-node a100:4 --time 1-02:00:00 --policy kgt --deterministic train.py --lr 0.1")
    for line in (
        "#!/bin/bash",
        "#SBATCH --job-name=train",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --gpus-per-node=a100:4",
        "#SBATCH --time=1-02:00:00",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=USR1@90",
        "#SBATCH --requeue",
        "    kgtrun --policy=kgt --deterministic train.py --lr 0.1",
    ):
        assert line in made.splitlines()
    assert 'srun --cpus-per-task="$SLURM_CPUS_PER_TASK"' in made and "partition" not in made


def test_arrays_setup_elastic_jobs_and_quoting():
    made = text("--array 0-3%2 --setup X=1 --nnodes 1:3 --partition p --warn-s 30 train.py")
    assert "--array=0-3%2" in made and "--output=slurm-%A_%a.out" in made and "--signal=USR1@30" in made
    assert "\nX=1\n" in made and "#SBATCH --nodes=3" in made and "kgtrun --nnodes=1:3 train.py" in made
    assert "#SBATCH --partition=p" in made and "#SBATCH --cpus-per-task=4" in made
    spaced = script(read(["--run-dir", "my runs", "train.py", "a b", "$HOME"], {}, SLURM + ALL))
    assert "'--run-dir=my runs' train.py 'a b' '$HOME'" in spaced


def test_the_shell_accepts_it_and_it_is_written_executable(tmp_path, capsys):
    path = tmp_path / "job.sh"
    assert main(["slurm-script", "--write", str(path), "train.py"]) == 0
    assert path.stat().st_mode & stat.S_IXUSR and f"sbatch {path}" in capsys.readouterr().err
    assert subprocess.run(["bash", "-n", str(path)], timeout=30, env={"PATH": os.environ["PATH"]}).returncode == 0
    assert main(["slurm-script", "--help"]) == 0 and "--cpus-per-task" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--nnodes 2", "no training script"),
        ("--time soon x.py", "HH:MM:SS"),
        ("--gpus-per-node many x.py", "a100:4"),
        ("--cpus-per-task x x.py", "whole number"),
        ("--partitoin p x.py", "did you mean --partition"),
        ("--hang-action wait x.py", "report, stop"),
    ],
)
def test_mistakes_say_what_is_valid(line, message):
    with pytest.raises(ValueError, match=message):
        text(line)
