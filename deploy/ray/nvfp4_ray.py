"""nvfp4 as a Ray Serve application: replicas of one server behind Ray's proxy.

    cd deploy/ray && serve run config.yaml

Ray routes, scales and replaces replicas; each has an engine process of its own, which dies with it. Needs ray[serve]
2.60 or later.
"""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from server.embedded import embedded_app, why_unhealthy


class Settings(BaseModel):
    """`args` of the application in config.yaml: the flags of `nvfp4 serve`, model included."""

    model_config = ConfigDict(extra="forbid")

    flags: list[str]


# As many requests at once as the engine runs (--max-num-seqs); Ray's 5 would starve it. The rest waits with the
# proxies, which can still choose another replica, and beyond that is refused as the server itself would.
@serve.deployment(
    name="nvfp4",
    max_ongoing_requests=64,
    max_queued_requests=1024,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
    health_check_period_s=5,
    health_check_timeout_s=10,
    graceful_shutdown_wait_loop_s=1,
    graceful_shutdown_timeout_s=60,
)
@serve.ingress()
class Replica:
    """One server without a port. Ray stops routing to it before it ends, and waits for what runs."""

    async def __init__(self, flags: list[str]) -> None:
        self._served = await embedded_app(flags)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._served

    async def check_health(self) -> None:
        """Three failures in a row, and Ray replaces the replica; our supervisor replaces an engine faster than that."""
        reason = why_unhealthy(self._served)
        if reason is not None:
            raise RuntimeError(reason)


def app(args: Settings) -> Application:
    return Replica.bind(args.flags)
