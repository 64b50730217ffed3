# Sourced by the launchers: settings of the libraries, each with its reason. What is set already stays. A site's own go
# into launch/site.env, which is read first: modules, PATH of SLURM's commands, MF_PYTHON, network interfaces, for example
#   module load cuda; export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 MF_ADDRESS=$(hostname)-ib0
if [ -z "${mf_site_read:-}" ] && [ -f "$(dirname "${BASH_SOURCE[0]}")/site.env" ]; then
  set +u # modules do not expect it
  . "$(dirname "${BASH_SOURCE[0]}")/site.env"
  set -u
fi
# Ranks that wait for a dead peer fail with an error instead of hanging (torch's default since 2.2, said aloud).
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# NCCL says its version and what fails, and nothing else.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Fragmentation killed long runs with crops of changing size: let segments grow.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# Log lines appear when they are written, not when a buffer is full (a killed rank loses its buffer).
export PYTHONUNBUFFERED=1
# A crash of many ranks would fill the disk that the checkpoints need, with cores that nobody reads.
ulimit -S -c 0 2>/dev/null
# Shards, loader processes and connections each hold files open; many systems allow 1024 by default.
ulimit -S -n "$(ulimit -H -n)" 2>/dev/null
