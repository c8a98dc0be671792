#!/usr/bin/env bash
#SBATCH --job-name=xlstm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#
# run_slurm.sh: the same under Slurm, with an MPI that Slurm can start (srun --mpi=list shows pmix).
#
#   SP=2 sbatch scripts/run_slurm.sh --train book.txt --out /shared/book ...     from the project's directory
#   TRAINER=./train_xlstmcu sbatch --gpus-per-node=4 scripts/run_slurm.sh ...    a rank a GPU
#
# Two minutes before its time is over every rank gets SIGTERM: they finish the step, save and end. --resume makes the
# same command go on from there, also after a node has failed and Slurm has queued the job again.
set -eu
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
exec srun --mpi=pmix "${TRAINER:-./train_xlstm}" --sp "${SP:-1}" --zero 1 --comm-timeout 300 --resume "$@"
