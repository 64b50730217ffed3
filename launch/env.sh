# Sourced by the launchers: settings of the libraries, each with its reason. A site's own go into launch/site.env.
# Ranks that wait for a dead peer fail with an error instead of hanging (torch's default since 2.2, said aloud).
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# Fragmentation killed long runs with crops of changing size: let segments grow.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# Log lines appear when they are written, not when a buffer is full (a killed rank loses its buffer).
export PYTHONUNBUFFERED=1
if [ -f "$(dirname "${BASH_SOURCE[0]}")/site.env" ]; then
  . "$(dirname "${BASH_SOURCE[0]}")/site.env"
fi
