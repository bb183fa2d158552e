"""What `kubectl apply -k` and `helm install` would send: valid, least privilege, and true of our server."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml

from server.cli import _parser
from tests.deploy.manifests import (
    DEPLOY,
    RELEASES,
    SETS,
    Manifest,
    as_pod,
    check_schema,
    helm_template,
    kustomized,
    of_kind,
    pod_templates,
    rendered,
)
from tests.fakes import FakeEngine
from tests.server.conftest import Serve, serve  # noqa: F401 - a fixture


@pytest.fixture(params=SETS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return rendered(request.param)


def containers(manifests: list[Manifest]) -> list[Manifest]:
    return [one for template in pod_templates(manifests) for one in template["spec"]["containers"]]


def flags(container: Manifest) -> Any:
    """What serve understands; a flag that it has not, or a value that it does not take, ends the test."""
    parser, _ = _parser()
    return parser.parse_args(["serve", *container["args"]])


def test_every_manifest_fits_its_schema(manifests: list[Manifest]) -> None:
    assert manifests
    for manifest in manifests:
        check_schema(manifest)


def test_everything_lies_in_one_namespace(manifests: list[Manifest]) -> None:
    names = {manifest["metadata"].get("namespace") for manifest in manifests if manifest["kind"] != "Namespace"}
    assert names == {"nvfp4"}


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "template", "spec", "enableServiceLink"), False),
        ("Deployment", ("spec", "replicas"), "two"),
        ("InferencePool", ("spec", "targetPortNumber"), 8000),
        ("ScaledObject", ("spec", "maxReplicas"), 3),
        ("PodMonitor", ("spec", "endpoints"), []),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "foor"), "1m"),
        ("HTTPRoute", ("spec", "rules", 0, "timeouts", "request"), "10 minutes"),
    ],
)
def test_a_misspelt_or_mistyped_field_would_be_found(kind: str, path: tuple[str | int, ...], value: Any) -> None:
    (manifest,) = of_kind(helm_template(RELEASES["everything"] | {"keda": {"enabled": True}}), kind)
    if path[-1] == "replicas":
        (manifest,) = of_kind(helm_template({}), kind)
    check_schema(manifest)
    found: Any = manifest
    for step in path[:-1]:
        found = found[step]
    found[path[-1]] = value
    with pytest.raises(Exception, match=re.escape(str(path[-1] if isinstance(value, bool | int | list) else value))):
        check_schema(manifest)


def test_pods_meet_the_restricted_standard_and_write_nowhere_but_their_volumes(manifests: list[Manifest]) -> None:
    for template in pod_templates(manifests):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & spec.keys()
        assert all(
            {"name"} < volume.keys() <= {"name", "persistentVolumeClaim", "secret", "emptyDir"}
            for volume in spec["volumes"]
        )
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert mounts["/model"]["readOnly"] is True
            assert {"/cache", "/tmp"} <= mounts.keys()
            assert {mount["name"] for mount in mounts.values()} <= {volume["name"] for volume in spec["volumes"]}
        for volume in spec["volumes"]:
            assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": ""}), "an unbounded folder fills the node"
    for account in of_kind(manifests, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert not of_kind(manifests, "Secret")
    assert not {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"} & {one["kind"] for one in manifests}
    for namespace in of_kind(manifests, "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_images_have_a_version_and_pods_have_bounds(manifests: list[Manifest]) -> None:
    assert containers(manifests)
    for container in containers(manifests):
        assert re.search(r":\d+\.\d+\.\d+-(cpu|cuda)$", container["image"])
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert limits["memory"] == requests["memory"], "more than was asked for may not be there when it is needed"
        assert {"cpu", "ephemeral-storage"} <= requests.keys()
        device = flags(container).device
        assert container["image"].endswith(f"-{device}")
        assert ("nvidia.com/gpu" in limits) == (device == "cuda")
        if device == "cpu":
            assert str(limits["cpu"]).isdigit(), "the server starts as many threads as it may use CPUs"


def test_no_environment_variable_of_kubernetes_is_taken_for_a_flag(manifests: list[Manifest]) -> None:
    """A Service called nvfp4 gives every pod with service links NVFP4_PORT=tcp://10.0.0.1:80."""
    assert all(template["spec"]["enableServiceLinks"] is False for template in pod_templates(manifests))


def test_what_has_a_key_file_mounts_it_readable_and_the_rest_says_that_none_is_meant(manifests: list[Manifest]) -> None:
    for template in pod_templates(manifests):
        secrets = [volume["secret"] for volume in template["spec"]["volumes"] if "secret" in volume]
        for container in template["spec"]["containers"]:
            args = flags(container)
            assert (args.api_key_file is not None) != bool(args.allow_unauthenticated)
            if args.api_key_file is None:
                assert not secrets
                continue
            assert str(args.api_key_file) == "/etc/nvfp4/keys"
            assert "/etc/nvfp4" in {mount["mountPath"] for mount in container["volumeMounts"]}
            assert secrets[0]["defaultMode"] == 0o440  # root's group is the image's; nobody else reads it


def test_a_pod_is_given_longer_than_its_server_drains(manifests: list[Manifest]) -> None:
    for template in pod_templates(manifests):
        for container in template["spec"]["containers"]:
            args = flags(container)
            pre_stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            longest = pre_stop + args.drain_delay + args.shutdown_timeout
            assert template["spec"]["terminationGracePeriodSeconds"] >= longest + 5


def test_an_endpoint_is_gone_before_the_server_refuses(manifests: list[Manifest]) -> None:
    """Readiness is seen to fail within --drain-delay; a server that loads has as long as it gives itself."""
    probed = [container for container in containers(manifests) if "readinessProbe" in container]
    assert probed
    for container in probed:
        args = flags(container)
        ready, live, start = (container[f"{name}Probe"] for name in ("readiness", "liveness", "startup"))
        assert ready["periodSeconds"] * ready["failureThreshold"] <= args.drain_delay
        assert live["httpGet"]["path"] == "/health/live"
        assert ready["httpGet"]["path"] == "/health/ready"
        assert start["periodSeconds"] * start["failureThreshold"] >= args.engine_start_timeout
        assert all(1 < probe["timeoutSeconds"] <= probe["periodSeconds"] for probe in (ready, live, start))


async def test_probes_ask_routes_of_the_server_on_its_port(manifests: list[Manifest], serve: Serve) -> None:  # noqa: F811
    server = await serve(FakeEngine())
    for container in containers(manifests):
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container:
                get = container[probe]["httpGet"]
                assert ports[get["port"]] == 8000
                assert (await server.http.get(get["path"])).status_code == 200
        if ports:
            assert ports["metrics"] == flags(container).metrics_port
            assert "NVFP4_PORT" not in {variable["name"] for variable in container.get("env", [])}


def test_selectors_meet_pods_and_ports_meet_containers(manifests: list[Manifest]) -> None:
    pods = [template["metadata"]["labels"] for template in pod_templates(manifests)]
    for pod in pods:  # set by the controller
        if pod.get("app.kubernetes.io/component") == "leader":
            pod["leaderworkerset.sigs.k8s.io/worker-index"] = "0"
    leader = containers(manifests)[0]
    names = {port["name"]: port["containerPort"] for port in leader["ports"]}

    def meets(selector: dict[str, str]) -> bool:
        return any(selector.items() <= pod.items() for pod in pods)

    selecting = 0
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Service":
            assert meets(spec["selector"])
            assert all(port["targetPort"] in names for port in spec["ports"])
        elif manifest["kind"] in ("Deployment", "PodDisruptionBudget", "PodMonitor", "InferencePool"):
            assert meets(spec["selector"]["matchLabels"]), manifest["kind"]
        elif manifest["kind"] == "NetworkPolicy":
            assert meets(spec["podSelector"]["matchLabels"])
        else:
            continue
        selecting += 1
        if manifest["kind"] == "PodMonitor":
            assert all(endpoint["port"] == "metrics" for endpoint in spec["podMetricsEndpoints"])
            assert pods[0][spec["jobLabel"]] == "nvfp4", "the alerts' job"
        if manifest["kind"] == "InferencePool":
            assert [port["number"] for port in spec["targetPorts"]] == [names["http"]]
    assert selecting >= 3


def test_requests_come_in_on_8000_metrics_from_named_readers_and_only_names_are_asked_for(
    manifests: list[Manifest],
) -> None:
    group = bool(of_kind(manifests, "LeaderWorkerSet"))
    policies = of_kind(manifests, "NetworkPolicy")
    assert any(policy["spec"]["policyTypes"] == ["Ingress", "Egress"] for policy in policies)
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            ports = {port["port"] for port in rule.get("ports", [])}
            if ports == {9100}:
                assert all(peer.keys() & {"namespaceSelector", "podSelector"} for peer in rule["from"])
            elif ports != {8000}:
                assert group
                assert rule == {"from": [{"podSelector": policy["spec"]["podSelector"]}]}, "ranks, among themselves"
        for rule in policy["spec"].get("egress", []):
            if {port["port"] for port in rule.get("ports", [])} != {53}:
                assert group
                assert rule == {"to": [{"podSelector": policy["spec"]["podSelector"]}]}


def test_an_update_or_a_node_that_is_drained_leaves_a_server(manifests: list[Manifest]) -> None:
    for deployment in of_kind(manifests, "Deployment"):
        assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    (budget,) = of_kind(manifests, "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1


def test_what_is_scaled_names_no_number_of_replicas(manifests: list[Manifest]) -> None:
    (server,) = [*of_kind(manifests, "Deployment"), *of_kind(manifests, "LeaderWorkerSet")]
    scaled = of_kind(manifests, "ScaledObject")
    assert ("replicas" in server["spec"]) != bool(scaled)
    for one in scaled:
        target = {"apiVersion": server["apiVersion"], "kind": server["kind"], "name": server["metadata"]["name"]}
        assert one["spec"]["scaleTargetRef"] == target
        assert one["spec"]["minReplicaCount"] <= one["spec"]["maxReplicaCount"]
        for trigger in one["spec"]["triggers"]:
            namespace = set(re.findall(r'namespace="([^"]*)"', trigger["metadata"]["query"]))
            assert namespace == {one["metadata"]["namespace"]}


def test_the_gateway_waits_longer_than_the_server() -> None:
    manifests = kustomized("inference-pool")
    (route,) = of_kind(manifests, "HTTPRoute")
    (pool,) = of_kind(manifests, "InferencePool")
    (rule,) = route["spec"]["rules"]
    assert float(rule["timeouts"]["request"].removesuffix("s")) > flags(containers(manifests)[0]).request_timeout
    assert [backend["name"] for backend in rule["backendRefs"]] == [pool["metadata"]["name"]]


@pytest.mark.parametrize("name", ["kustomize tensor-parallel", "helm groups", "helm groups on CPUs, scaled"])
def test_a_group_has_as_many_pods_as_ranks_and_all_of_them_start_alike(name: str) -> None:
    manifests = rendered(name)
    assert not of_kind(manifests, "Deployment")
    (group,) = of_kind(manifests, "LeaderWorkerSet")
    leader, worker = containers(manifests)
    assert leader["args"] == worker["args"]
    assert leader["env"] == worker["env"]
    assert leader["resources"] == worker["resources"]
    size = group["spec"]["leaderWorkerTemplate"]["size"]
    assert flags(leader).tensor_parallel_size == size
    assert leader["resources"]["limits"].get("nvidia.com/gpu", "1") == "1", "a rank has one GPU"
    assert group["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert "readinessProbe" not in worker, "only rank 0 answers HTTP"
    answering = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}.items()
    (service,) = of_kind(manifests, "Service")
    assert answering <= service["spec"]["selector"].items()
    for pool in of_kind(manifests, "InferencePool"):
        assert answering <= pool["spec"]["selector"]["matchLabels"].items()
    if leader["resources"]["limits"].get("nvidia.com/gpu"):
        args = flags(leader)
        assert args.kv_cache_memory or args.num_kv_blocks, "ranks on GPUs do not start without"
    assert any(  # what the ranks say to each other
        rule == {"from": [{"podSelector": policy["spec"]["podSelector"]}]}
        for policy in of_kind(manifests, "NetworkPolicy")
        for rule in policy["spec"]["ingress"]
    )


@pytest.mark.parametrize(
    "values",
    [
        {"gpus": 2},
        {"flags": {"kv-cache-memory": "8GiB", "tensor-parallel-size": 2}},
        {"flags": {"kv-cache-memory": "8GiB", "data-parallel-size": 2}},
        {"device": "cuda", "flags": {}},
        {"tensorParallel": {"pods": 0}},
        {"tensorParallel": {"size": 2}},
    ],
)
def test_the_chart_refuses_a_group_that_would_not_start(values: Manifest) -> None:
    merged = {"tensorParallel": {"pods": 2}} | values
    with pytest.raises(AssertionError, match="values don't meet"):
        helm_template(merged)


@pytest.mark.parametrize(
    ("overlay", "values"),
    [
        ("cpu", {}),
        (
            "single-gpu",
            {
                "device": "cuda",
                "resources": {
                    "requests": {"cpu": "4", "memory": "32Gi", "ephemeral-storage": "2Gi"},
                    "limits": {"cpu": None, "memory": "32Gi", "ephemeral-storage": "16Gi"},
                },
            },
        ),
        ("tensor-parallel", RELEASES["groups"]),
    ],
)
def test_the_chart_makes_the_pods_that_kustomize_makes(overlay: str, values: dict[str, Any]) -> None:
    def pods(manifests: list[Manifest]) -> list[Manifest]:
        found = [as_pod(copy.deepcopy(template))["spec"] for template in pod_templates(manifests)]
        for spec in found:
            for constraint in spec.get("topologySpreadConstraints", []):
                constraint["labelSelector"]["matchLabels"].pop("app.kubernetes.io/instance", None)
            for container in spec["containers"]:
                container.pop("imagePullPolicy", None)
        return found

    assert pods(helm_template(values)) == pods(kustomized(overlay))


@pytest.mark.parametrize("name", ["kustomize monitoring", "kustomize keda", "helm everything"])
def test_the_cluster_gets_the_alerts_and_the_dashboard_of_compose(name: str) -> None:
    manifests = rendered(name)
    (rule,) = of_kind(manifests, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    (dashboard,) = of_kind(manifests, "ConfigMap")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    (text,) = dashboard["data"].values()
    assert text.strip() == (DEPLOY / "grafana" / "dashboards" / "nvfp4.json").read_text().strip()
