#!/bin/bash
# Train on a SLURM cluster:  sbatch slurm.sh experiments/cifar10_resnet20_paper.yaml        (two nodes with four GPUs each)
#                            sbatch slurm.sh --resume RUN                                   (what a time limit or a lost node ended)
# The lines of #SBATCH are to be fitted to the cluster: a task for each GPU. Data and runs lie where all nodes see them.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%j.out
export DATA_DIR=${DATA_DIR:-$PWD/data} RUNS_DIR=${RUNS_DIR:-$PWD/runs}

# Where one task ends with an error, the others would wait for it: srun is to end them. (Some of its versions do not know of
# --cpus-per-task unless told: loaders would share one core.)
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" python train.py "$@" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp
