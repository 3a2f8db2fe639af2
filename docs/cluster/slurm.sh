#!/usr/bin/env bash
# Trains DPAR on 2 nodes of 8 GPUs: sbatch docs/cluster/slurm.sh [STAGE], from the project folder on a shared file system.
#SBATCH --job-name=dpar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue                  # a preempted job starts again and goes on from its last checkpoint
#SBATCH --output=slurm-%j.log
set -euo pipefail

stage=${1:-train_dpar}
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
export PATH="$PWD/.venv/bin:$PATH" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
(umask 077; ray get-auth-token --generate > /dev/null)   # in ~/.ray, which all nodes share
chmod 600 ~/.ray/auth_token

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')
export RAY_ADDRESS="$address:$((20000 + SLURM_JOB_ID % 20000))"

# srun takes no --cpus-per-task from sbatch. Slurm ends both steps with the job; nothing else of yours on these nodes is touched.
srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodelist="${nodes[0]}" \
    ray start --head --block --node-ip-address="$address" --port="${RAY_ADDRESS##*:}" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" &
until ray status > /dev/null 2>&1; do sleep 2; done
if ((${#nodes[@]} > 1)); then
    rest=$(IFS=,; echo "${nodes[*]:1}")
    srun --overlap --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) \
        --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodelist="$rest" \
        ray start --block --address="$RAY_ADDRESS" --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" &
fi
until [ "$(python -c 'import ray; ray.init(log_to_driver=False, logging_level="error"); print(sum(n["Alive"] for n in ray.nodes()))')" = "${#nodes[@]}" ]; do
    sleep 2
done

srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodelist="${nodes[0]}" dpar-cli run "$stage"
