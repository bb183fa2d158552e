"""The page's files over HTTP: what is served, with which headers, to whom; and that the package brings them."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from server.config import hash_key
from server.routes.ui import static_files
from tests.fakes import FakeEngine
from tests.server.conftest import Serve, assert_error

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "server" / "ui"
FILES = static_files()


def test_every_file_of_the_folder_is_served_under_its_own_name() -> None:
    served = {"/": "index.html"} | {path: path.removeprefix("/ui/") for path in FILES if path != "/"}
    assert set(served) == set(FILES)
    assert {name: FILES[path].content for path, name in served.items()} == {
        file.name: file.read_bytes() for file in FOLDER.iterdir()
    }


def test_what_the_files_refer_to_is_there_and_nothing_is_left_over() -> None:
    html = FILES["/"].content.decode()
    referred = set(re.findall(r'(?:src|href)="(/[^"]*)"', html))
    for path, file in FILES.items():
        if path.endswith(".js"):
            imported = re.findall(r'(?:from|import\() ?"([^"]*)"', file.content.decode())
            assert all(each.startswith("./") for each in imported), path
            referred |= {f"/ui/{each.removeprefix('./')}" for each in imported}
    assert referred == set(FILES) - {"/"}


def test_no_file_names_another_host_or_has_inline_script_or_style() -> None:
    for path, file in FILES.items():
        text = file.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(?:https?:)?//\w+\.\w", text), path
        assert "innerHTML" not in text, path
        assert not re.search(r"\beval\(|new Function|document\.write|insertAdjacentHTML", text), path
    html = FILES["/"].content.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", html))


@pytest.mark.parametrize("path", sorted(FILES))
async def test_files_come_with_strict_headers(serve: Serve, path: str) -> None:
    server = await serve()
    response = await server.http.get(path)
    assert (response.status_code, response.content) == (200, FILES[path].content)
    headers = response.headers
    kinds = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "/": "text/html"}
    assert headers["content-type"].split(";")[0] == kinds[path.rpartition(".")[2]]
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["object-src"] == policy["form-action"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in headers["content-security-policy"]
    assert "http" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-request-id"]
    head = await server.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(FILES[path].content))
    assert head.headers["etag"] == headers["etag"]


async def test_a_file_that_is_known_is_not_sent_again(serve: Serve) -> None:
    server = await serve()
    etag = (await server.http.get("/")).headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        response = await server.http.get("/", headers={"if-none-match": known})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == etag
        assert "content-security-policy" in response.headers
    for unknown in ('"other"', etag.strip('"'), ""):
        assert (await server.http.get("/", headers={"if-none-match": unknown})).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/ui", "/ui/", "/ui/index.html", "/ui/../config.py", "/ui/%2e%2e/config.py", "/ui/..%2fconfig.py",
        "/ui//main.js", "/ui/..\\config.py", "/ui/main.js/", "/ui/main.js%00", "/ui/%2fetc%2fpasswd",
        "//ui/main.js", "/UI/main.js",
    ],
)  # fmt: skip
async def test_other_paths_are_404_with_and_401_without_reach_of_any_file(serve: Serve, path: str) -> None:
    url = f"http://test{path}"
    assert_error(await (await serve()).http.get(url), 404, None)
    assert_error(await (await serve(api_key_hashes=(hash_key("one"),))).http.get(url), 401, None)


async def test_other_methods_are_refused(serve: Serve) -> None:
    server = await serve()
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert_error(await server.http.request(method, "/"), 405, None)


async def test_files_need_no_key_and_what_they_ask_for_does(serve: Serve) -> None:
    server = await serve(api_key_hashes=(hash_key("one"),))
    for path in FILES:
        assert (await server.http.get(path)).status_code == 200
    for path in ("/metrics", "/requests", "/v1/models", "/version"):
        assert_error(await server.http.get(path), 401, None)


async def test_page_can_be_left_out(serve: Serve) -> None:
    server = await serve(ui=False)
    for path in FILES:
        assert_error(await server.http.get(path), 404, None)
    keyed = await serve(ui=False, api_key_hashes=(hash_key("one"),))
    assert_error(await keyed.http.get("/"), 401, None)


async def test_page_is_no_part_of_the_api_document(serve: Serve) -> None:
    paths = (await (await serve()).http.get("/openapi.json")).json()["paths"]
    assert not {"/", "/ui/main.js"} & set(paths)
    assert "/requests" in paths


async def test_last_requests_are_listed_with_their_times_and_without_their_text(serve: Serve) -> None:
    server = await serve(FakeEngine(num_cached_tokens=2))
    assert (await server.http.get("/requests")).json() == {"object": "list", "data": []}
    first = await server.chat(max_tokens=3, messages=[{"role": "user", "content": "a secret"}])
    await server.complete(max_tokens=5)
    listed = await server.http.get("/requests")
    assert "secret" not in listed.text
    newer, older = listed.json()["data"]
    assert older["id"].startswith(first.json()["id"])
    assert (older["completion_tokens"], newer["completion_tokens"]) == (3, 5)
    assert (older["finish_reason"], older["cached_tokens"]) == ("length", 2)
    assert older["prompt_tokens"] == first.json()["usage"]["prompt_tokens"]
    assert older["queue_seconds"] == 0.0
    assert older["ttft_seconds"] == pytest.approx(0.001)
    assert older["total_seconds"] == pytest.approx(older["ttft_seconds"] + older["decode_seconds"])
    assert older["ended"] <= newer["ended"]


async def test_a_request_that_failed_is_listed_as_an_error_without_times(serve: Serve) -> None:
    server = await serve(FakeEngine(step_seconds=0.01))
    running = asyncio.create_task(server.complete(max_tokens=200))
    await asyncio.sleep(0.1)
    server.engine.die()
    await running
    (listed,) = (await server.http.get("/requests")).json()["data"]
    assert listed["finish_reason"] == "error"
    assert listed["total_seconds"] is listed["ttft_seconds"] is None
    assert listed["completion_tokens"] > 0
    await server.complete()
    assert len((await server.http.get("/requests")).json()["data"]) == 1, "the second was never accepted"


async def test_a_key_sees_its_own_requests_only(serve: Serve) -> None:
    server = await serve(api_key_hashes=(hash_key("one"), hash_key("two")))
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}
    assert (await server.http.post("/v1/completions", json=body, headers=one)).status_code == 200
    assert len((await server.http.get("/requests", headers=one)).json()["data"]) == 1
    assert (await server.http.get("/requests", headers=two)).json()["data"] == []


async def test_no_more_than_a_hundred_requests_are_kept(serve: Serve) -> None:
    server = await serve()
    await server.complete(prompt=["Hi"] * 101, max_tokens=1)
    assert len((await server.http.get("/requests")).json()["data"]) == 100


@pytest.mark.slow
def test_wheel_and_source_archive_bring_the_page(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core", reason="scikit-build-core is not installed: it is in the extra `test`")
    # Without CMake: the native kernels have no part in this.
    code = (
        "import sys; from scikit_build_core.build import build_sdist, build_wheel\n"
        "build_wheel(sys.argv[1], {'wheel.cmake': 'false'}); build_sdist(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {file.name for file in FOLDER.iterdir()}
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert names <= {Path(name).name for name in archive.namelist() if name.startswith("server/ui/")}
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert names <= {Path(name).name for name in archive.getnames() if "/server/ui/" in name}
