"""Whether one more request may wait: the queue's limits, checked by whoever lets requests in."""

from .config import SchedulerConfig
from .errors import QueueFullError


def check_room(config: SchedulerConfig, waiting_seqs: int, waiting_tokens: int, seqs: int, tokens: int) -> None:
    """Refuse what would overflow the queue; a request that finds it empty may always wait.

    waiting_seqs, waiting_tokens  samples that wait for their first step, and their prompt tokens
    seqs, tokens                  of the request that comes
    Raises QueueFullError.
    """
    if waiting_seqs and waiting_seqs + seqs > config.max_waiting_requests:
        raise QueueFullError(
            f"{waiting_seqs} requests wait already, at most {config.max_waiting_requests} may; try again later, "
            "or serve with a larger max_waiting_requests."
        )
    if waiting_seqs and waiting_tokens + tokens > config.max_waiting_tokens:
        raise QueueFullError(
            f"{waiting_tokens} prompt tokens wait already, at most {config.max_waiting_tokens} may, got {tokens} "
            "more; try again later, or serve with a larger max_waiting_tokens."
        )
