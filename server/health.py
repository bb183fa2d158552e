"""Is this server alive, is it ready: read from what it knows already. Nothing here waits for the engine."""

from __future__ import annotations

from server.state import ServerState


def why_not_live(server: ServerState) -> str | None:
    """None: the process does its work, or is busy replacing what does not. Else a restart from outside is due."""
    stalled, limit = server.engine.stalled_seconds, 2 * server.config.stall_seconds
    return f"the engine has made no progress for {stalled:.0f} s" if stalled >= limit else None


def why_not_healthy(server: ServerState) -> str | None:
    """None: loaded, warmed up, self-tested (before anybody can ask), progressing, and nobody told us to stop."""
    engine = server.engine
    if server.draining:
        return "the server is shutting down"
    if not engine.alive:
        return engine.death_reason or "the engine is not running"
    if (stalled := engine.stalled_seconds) >= server.config.stall_seconds:
        return f"work waits and the engine has made no progress for {stalled:.0f} s"
    return None


def why_not_ready(server: ServerState) -> str | None:
    """The same, and the queue has room: a server that is only busy should get no more, and should not be killed."""
    if (reason := why_not_healthy(server)) is not None:
        return reason
    waiting, bound = server.engine.stats.num_waiting, max(1, server.engine.info.max_queued_requests)
    if waiting >= bound:
        return f"the queue is full: {waiting} requests wait, {bound} may"
    tokens, bound = server.engine.admission.num_queued_tokens, server.engine.info.max_queued_tokens
    return f"the queue is full: {tokens} prompt tokens wait, {bound} may" if tokens >= bound else None
