"""Terms: on whose behalf a request runs, and within which bounds."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import Scope

from server.config import ServerConfig
from server.deadline import allowed_seconds

_TENANT = "nvfp4.tenant"


@dataclass(frozen=True)
class Terms:
    """What was agreed.

    tenant            whose API key it is: "key-0", "key-1", ... in the order of the key file; "" where there is one
                      key, or none
    salts_cache       this tenant's prefix cache is its own
    timeout_seconds   from admission to the last token
    max_unread_bytes  of a streamed answer whose client lags
    """

    tenant: str
    salts_cache: bool
    timeout_seconds: float
    max_unread_bytes: int

    @classmethod
    def of(cls, scope: Scope, timeout: float | None, config: ServerConfig) -> Terms:
        """Raises InvalidParameterError for a `timeout` that is longer than the server's."""
        seconds = allowed_seconds(timeout, config.request_timeout_seconds)
        return cls(tenant_of(scope), not config.share_prefix_cache, seconds, config.stream_buffer_bytes)

    def salted(self, cache_salt: str | None) -> str:
        """The engine's salt: what tells the prefix cache of one tenant, and of one `cache_salt`, from others."""
        return f"{self.tenant}\0{cache_salt or ''}" if self.tenant and self.salts_cache else cache_salt or ""


def set_tenant(scope: Scope, tenant: str) -> None:
    scope[_TENANT] = tenant


def tenant_of(scope: Scope) -> str:
    """Set by the check of the API key; "" where no key told tenants apart."""
    tenant: str = scope.get(_TENANT, "")
    return tenant
