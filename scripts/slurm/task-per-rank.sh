#!/bin/bash
# One task a rank: Slurm hands out cores and GPUs rank by rank, each task is a kgtrun of one rank.
#
#   sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-task 1 scripts/slurm/task-per-rank.sh train.py --lr 0.1
#
# What stands before the script on sbatch's line wins over what is written here. Options of kgtrun go before train.py.
#SBATCH --job-name=kgtrun
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=2
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=USR1@90
#SBATCH --requeue
set -euo pipefail

# srun takes no notice of sbatch's --cpus-per-task since Slurm 22.05: it must be told.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" kgtrun "$@"
