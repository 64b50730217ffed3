"""Names of the signals that can ask a run to stop. No imports: they are needed before the slow ones."""

from __future__ import annotations

STOPPING = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "SIGQUIT", "SIGXCPU")
"""What train.stop_signals may name. SIGKILL and SIGSTOP cannot be caught; the others mean something else."""
DEFAULT = ("SIGTERM", "SIGUSR1", "SIGINT")
"""What is caught before the configuration is read: the default of train.stop_signals."""
