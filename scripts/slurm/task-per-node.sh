#!/bin/bash
# One task a node; kgtrun starts a rank for each GPU of the node, or --nproc-per-node of them.
#
#   sbatch --nodes 4 --gpus-per-node 4 scripts/slurm/task-per-node.sh train.py --lr 0.1
#
# What stands before the script on sbatch's line wins over what is written here. Options of kgtrun go before train.py.
#SBATCH --job-name=kgtrun
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=USR1@90
#SBATCH --requeue
set -euo pipefail

# srun takes no notice of sbatch's --cpus-per-task since Slurm 22.05: it must be told.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" kgtrun "$@"
