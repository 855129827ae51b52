# Shared by dist_train.sh and dist_test.sh, which source it.

launch() {  # script, processes, the script's arguments
    local script=$1 processes=$2
    # Without GPUs the processes share the cores.
    if [ "${CUDA_VISIBLE_DEVICES-all}" = '' ] || ! nvidia-smi -L >/dev/null 2>&1; then
        local cores; cores=$(nproc)
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
    fi
    exec python -m torch.distributed.run \
        --nnodes="${NNODES:-1}" \
        --node_rank="${NODE_RANK:-0}" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" \
        --master_port="${PORT:-29500}" \
        --nproc_per_node="$processes" \
        "$(dirname "${BASH_SOURCE[0]}")/$script" "${@:3}" --launcher pytorch
}
