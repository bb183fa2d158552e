"""The page at `/`: static files of the package, read once at start and served from a fixed table.

No path of a request ever reaches the file system. The files hold no secrets and are served without a key; what the page
shows it asks of the API, with the key that its user gave it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

INDEX = "index.html"
PREFIX = "/ui/"
MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Scripts, styles and requests of this origin only, nothing inline; no string becomes markup (trusted types).
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "cache-control": "no-cache",  # keep it, and ask each time whether it is still the same: the ETag answers
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class StaticFile:
    content: bytes
    media_type: str
    etag: str


def static_files() -> dict[str, StaticFile]:
    """Every file of the page by the path it is served at."""
    found = {}
    for file in resources.files("server").joinpath("ui").iterdir():
        content = file.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        path = "/" if file.name == INDEX else PREFIX + file.name
        found[path] = StaticFile(content, MEDIA_TYPES[file.name.rpartition(".")[2]], etag)
    return found


def ui_router(files: dict[str, StaticFile]) -> APIRouter:
    """GET and HEAD of each file, and of nothing else."""
    router = APIRouter()

    async def static_file(request: Request) -> Response:
        file = files[request.scope["path"]]
        headers = HEADERS | {"etag": file.etag}
        if _is_known(request.headers.get("if-none-match", ""), file.etag):
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)

    for path in files:
        router.add_api_route(
            path, static_file, methods=["GET", "HEAD"], include_in_schema=False, response_class=Response
        )
    return router


def _is_known(if_none_match: str, etag: str) -> bool:
    """RFC 9110: `*`, or a list of which one, weak or not, is ours."""
    asked = [each.strip().removeprefix("W/") for each in if_none_match.split(",")]
    return etag in asked or asked == ["*"]
