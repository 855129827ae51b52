# Shared by dist_train.sh and dist_test.sh, which source it.

launch() {  # script, processes, the script's arguments
    local script=$1 processes=$2
    [[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "$processes: expected a number of GPUs or CPU processes" >&2; exit 2; }
    python -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("mmlavit")))' || {
        echo "$(command -v python) has no torch or no mmlavit: source .venv/bin/activate, which bash tools/setup_env.sh makes" >&2
        exit 1
    }
    # Without GPUs the processes share the cores.
    if [ "${CUDA_VISIBLE_DEVICES-all}" = '' ] || ! nvidia-smi -L >/dev/null 2>&1; then
        local cores; cores=$(nproc)
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
    fi
    local address=${MASTER_ADDR:-127.0.0.1} port=${PORT:-29500}
    local meet=(--node_rank="${NODE_RANK:-0}" --master_addr="$address" --master_port="$port")
    if [ "${MAX_RESTARTS:-0}" -gt 0 ]; then
        # Restarted ranks need a store of their own: in the old one they find the
        # addresses of the dead, and hang.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        meet=(--rdzv-backend=c10d --rdzv-endpoint="$address:$port" --max-restarts="$MAX_RESTARTS")
    fi
    exec python -m torch.distributed.run \
        --nnodes="${NNODES:-1}" "${meet[@]}" \
        --nproc_per_node="$processes" \
        "$(dirname "${BASH_SOURCE[0]}")/$script" "${@:3}" --launcher pytorch
}
