#!/bin/bash
# An array of runs, each on nodes of its own; the script reads which one it is from SLURM_ARRAY_TASK_ID.
#
#   sbatch --array 0-9%2 --gpus-per-node 4 scripts/slurm/array.sh train.py
#
# What stands before the script on sbatch's line wins over what is written here. Options of kgtrun go before train.py.
#SBATCH --job-name=kgtrun-array
#SBATCH --array=0-1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --output=slurm-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --signal=USR1@90
#SBATCH --requeue
set -euo pipefail

# srun takes no notice of sbatch's --cpus-per-task since Slurm 22.05: it must be told.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" kgtrun "$@"
