"""Builds the container image without a container engine's daemon, and runs it as a container would be run.

buildah builds our unchanged Dockerfile in a chroot, on a base that debootstrap makes of Debian's packages (a stand-in
for python:slim). To run it: a new mount and PID namespace, the root read-only, no capability left, the server as PID 1
under the image's own user, environment and entry point.
"""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.manifests import ROOT

SUITE = "bookworm"
# python3-dev: like the official images, the base holds Python's headers, and neither libpython.a nor Debian's manuals.
PACKAGES = ("python3", "python3-venv", "python3-dev", "ca-certificates")
TRIMMED = (
    "usr/share/doc/*",
    "usr/share/man/*",
    "usr/share/locale/*",
    "usr/lib/python3*/config*/*.a",
    "var/lib/apt/lists/*",
)
PROGRAMS = {"buildah": "buildah", "debootstrap": "debootstrap", "unshare": "util-linux", "setpriv": "util-linux"}


def skip_without_a_builder() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("image builder: buildah's chroot isolation and debootstrap need root on Linux")
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            pytest.skip(f"image builder {program} is not installed (Debian: apt-get install {package})")


def pip_settings(folder: Path) -> tuple[Path, list[str]]:
    """A pip.conf that says what pip is told here, by files and by environment; and the local paths that it names."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        # :env: comes last and wins, as for pip
        settings[name.split(".", 1)[1]] = value.strip("'").replace("\\n", " ")
    settings.pop("constraint", None)  # the Dockerfile has its own
    config = configparser.RawConfigParser()
    config["global"] = settings
    conf = folder / "pip.conf"
    with conf.open("w") as file:
        config.write(file)
    words = {word for value in settings.values() for word in value.split()}
    # an index's links lead beside it
    folders = {Path(word.removeprefix("file://")).parent for word in words if word.startswith("file:///")}
    paths = [Path(word) for word in words if word.startswith("/")]
    folders |= {path if path.is_dir() else path.parent for path in paths if path.exists()}
    return conf, sorted(map(str, folders))


class Builder:
    """buildah with a storage of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, *arguments: str) -> str:
        command = [
            "buildah",
            "--root",
            str(self._folder / "storage"),
            "--runroot",
            str(self._folder / "run"),
            *arguments,
        ]
        environment = {
            **os.environ,
            "BUILDAH_ISOLATION": "chroot",
            "STORAGE_DRIVER": "vfs",
            "TMPDIR": str(self._folder),
        }
        # A session of its own: a terminal would stop it when it looks for one from the background.
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
        return done.stdout.strip()

    def base(self, name: str) -> None:
        """A stand-in for python:slim out of Debian's packages, called `name`."""
        root = self._folder / "base"
        include = f"--include={','.join(PACKAGES)}"
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", include, SUITE, str(root)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr
        for pattern in (*TRIMMED, "var/cache/apt/archives/*.deb"):
            for path in root.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (root / "usr" / "bin" / "python").symlink_to("python3")
        container = self("from", "scratch")
        self("copy", "--quiet", container, str(root), "/")
        self("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        self("commit", "--quiet", "--rm", container, name)
        shutil.rmtree(root)

    def build(self, target: str, base: str, name: str) -> float:
        """Seconds that it took."""
        secret, folders = pip_settings(self._folder)
        started = time.monotonic()
        self(
            "bud", "--format", "docker", "--pull-never", "--target", target, "--tag", name,
            "--build-arg", f"PYTHON_IMAGE={base}", "--build-arg", "TORCH_INDEX=",
            "--secret", f"id=pip.conf,src={secret}",
            *(word for folder in folders for word in ("--volume", f"{folder}:{folder}:ro")),
            str(ROOT),
        )  # fmt: skip
        return time.monotonic() - started

    def config(self, name: str) -> dict[str, Any]:
        return json.loads(self("inspect", "--type", "image", name))["Docker"]["config"]

    def mounted(self, name: str) -> Path:
        return Path(self("mount", self("from", "--pull-never", name)))


def size_bytes(root: Path) -> int:
    """Bytes of all files below `root`, one that has several names once."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            found[status.st_dev, status.st_ino] = status.st_size
    return sum(found.values())


class Container:
    """One that runs. `pid` is the server's here; within, it is 1."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return int(children.read_text().split()[0])

    def log(self) -> str:
        return self._log.read_text()

    def running(self) -> bool:
        return self._process.poll() is None

    def exit_code(self, timeout: float) -> int:
        return self._process.wait(timeout)


@contextmanager
def container(
    root: Path, config: dict[str, Any], arguments: Sequence[str], environment: dict[str, str], model: Path, log: Path
) -> Iterator[Container]:
    """The image's entry point with `arguments`, where a container engine would have it run."""
    user, _, group = config["User"].partition(":")
    variables = [*config["Env"], *(f"{name}={value}" for name, value in environment.items())]
    mounts = [
        f"mount --bind {root} {root}",
        f"mount -o remount,bind,ro {root}",
        f"mount -t proc proc {root}/proc",
        f"mount --bind /dev {root}/dev",
        f"mount -t tmpfs -o mode=1777,size=64m tmpfs {root}/tmp",
        f"mount -t tmpfs -o uid={user},gid={group},mode=775,size=64m tmpfs {root}/cache",
        f"mount --bind -o ro {model} {root}/mnt",
    ]
    drop = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--bounding-set=-all", "--no-new-privs"]
    prepared = ["sh", "-c", f'{" && ".join(mounts)} && exec "$@"', "sh"]
    within = ["env", "-i", f"--chdir={config['WorkingDir']}", *variables, *config["Entrypoint"], *arguments]
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *prepared, "chroot", str(root), *drop, *within]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)
        try:
            yield Container(process, log)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(30)
