"""For tests that kill forks of their process."""

import threading

from tqdm import tqdm


def own_progress_lock() -> None:
    """Call it in the fork: progress bars share a lock, and one killed while it holds the lock would stop all others."""
    tqdm.set_lock(threading.RLock())
