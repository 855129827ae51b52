# Shared by dist_train.sh and dist_test.sh, which source it.

launch() {  # script, processes, the script's arguments
    local script=$1 processes=$2
    [[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "$processes: expected a number of GPUs or CPU processes" >&2; exit 2; }
    # Without the current folder, where a clone has mmlavit though it is not installed.
    python -c 'import importlib.util as u, sys; sys.path[:] = filter(None, sys.path); sys.exit(not (u.find_spec("torch") and u.find_spec("mmlavit")))' || {
        echo "$(command -v python) has no torch or no mmlavit: source .venv/bin/activate, which bash tools/setup_env.sh makes" >&2
        exit 1
    }
    # Without GPUs the processes share the cores.
    if [ "${CUDA_VISIBLE_DEVICES-all}" = '' ] || ! nvidia-smi -L >/dev/null 2>&1; then
        local cores; cores=$(nproc)
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
    fi
    local restarts=${MAX_RESTARTS:-0}
    [[ $restarts =~ ^[0-9]+$ ]] || { echo "MAX_RESTARTS=$restarts: expected how often to start again, e.g. 3" >&2; exit 2; }
    local address=${MASTER_ADDR:-127.0.0.1} port=${PORT:-29500}
    local meet=(--node_rank="${NODE_RANK:-0}" --master_addr="$address" --master_port="$port")
    if [ "$restarts" -gt 0 ]; then
        # Restarted ranks need a store of their own: in the old one they find the
        # addresses of the dead, and hang.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        meet=(--rdzv-backend=c10d --rdzv-endpoint="$address:$port" --max-restarts="$restarts")
    fi
    exec python -m torch.distributed.run \
        --nnodes="${NNODES:-1}" "${meet[@]}" \
        --nproc_per_node="$processes" \
        "$(dirname "${BASH_SOURCE[0]}")/$script" "${@:3}" --launcher pytorch
}
