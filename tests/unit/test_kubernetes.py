"""deploy/kubernetes renders, is what Kubernetes allows, and says what the server and the images say.

No cluster is at hand. test_kubernetes_network.py has who reaches whom, and
tests/integration/test_kubernetes_pod.py runs what a pod would run.
"""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import ValidationError, validate

from conftest import REPOSITORY
from containers import compose, dockerfile_of
from manifests import (
    KUBERNETES,
    OVERLAYS,
    Document,
    Manifests,
    code_blocks,
    compose_services,
    engine_args,
    kubectl,
    overlay,
    render,
    seconds_until_given_up,
    selects,
    settings_of,
)

OLDEST, NEWEST = "1.27", "1.37"
GPU = "nvidia.com/gpu"
PAGE = "kubernetes.md"
NAMESPACE = yaml.safe_load((KUBERNETES / "namespace.yaml").read_text())
BYTES = {"Gi": 2**30, "Mi": 2**20}

each_overlay = pytest.mark.parametrize("name", OVERLAYS)


def num_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * BYTES[unit]


@pytest.fixture(scope="module")
def own_overlay(tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    """The one that docs/kubernetes.md has as an example, in a copy of the directory, beside the others."""
    place = tmp_path_factory.mktemp("deploy") / "kubernetes"
    mine = Path(shutil.copytree(KUBERNETES, place)) / "overlays" / "mine"
    mine.mkdir()
    [block] = code_blocks(PAGE, "yaml")
    (mine / "kustomization.yaml").write_text(block)
    return render(mine)


# ---------------------------------------------------------------- the form


def test_every_overlay_is_tested_here() -> None:
    assert sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml")) == sorted(OVERLAYS)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@each_overlay
def test_every_object_is_what_the_schemas_of_kubernetes_allow(name: str, version: str) -> None:
    documents = [NAMESPACE, *overlay(name).documents]
    assert {document["kind"] for document in documents} == {
        *("Namespace", "ServiceAccount", "ConfigMap", "Service", "StatefulSet"),
        *("PodDisruptionBudget", "NetworkPolicy"),
    }
    for document in documents:
        assert validate(document, version, strict=True) == version


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("spec", "template", "spec", "containers", 0), {"readinesProbe": {}}),
        (("spec", "template", "spec", "containers", 0, "livenessProbe"), {"periodSeconds": "20"}),
        (("spec", "template", "spec", "securityContext", "seccompProfile"), {"type": None}),
        (("spec",), {"podManagmentPolicy": "Parallel"}),
    ],
)
def test_the_schemas_find_a_misspelled_field_and_a_wrong_type(place: tuple[str | int, ...], wrong: Document) -> None:
    document = copy.deepcopy(overlay("cpu").one("StatefulSet"))
    there: Any = document
    for step in place:
        there = there[step]
    there.update(wrong)
    with pytest.raises(ValidationError):
        validate(document, NEWEST, strict=True)


@each_overlay
def test_kubernetes_own_types_take_the_pod_and_its_quantities(name: str) -> None:
    """A quantity is any string to the schemas; `kubectl set --local` reads the object into Kubernetes' types."""
    text = yaml.safe_dump(overlay(name).one("StatefulSet"))
    read = ("set", "image", "--local", "--output", "yaml", "--filename", "-", "teacher=other")
    assert yaml.safe_load(kubectl(*read, text=text))["spec"]["template"]["spec"]["containers"][0]["image"] == "other"
    with pytest.raises(AssertionError, match="unable to parse quantity's suffix"):
        kubectl(*read, text=re.sub(r"memory: \d+Gi", r"\g<0>i", text))


@each_overlay
def test_everything_is_in_the_namespace_that_holds_the_secrets(name: str) -> None:
    assert {document["metadata"]["namespace"] for document in overlay(name).documents} == {"vopd"}
    assert NAMESPACE["metadata"]["name"] == "vopd"


# ---------------------------------------------------------------- settings and files


@each_overlay
def test_the_settings_ask_for_keys_over_tls(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifests = overlay(name)
    config = settings_of(manifests, monkeypatch, tmp_path)
    assert [config.open, config.plaintext, config.create_keys_file, config.trust_remote_code] == [False] * 4
    secrets = {
        mount: volume["secret"]["secretName"] for mount, volume in manifests.mounts.items() if "secret" in volume
    }
    files = (config.keys_file, config.tls_cert_file, config.tls_key_file)
    where = [(secrets[str(file.parent)], file.name) for file in files if file is not None]
    tls = "vopd-teacher-tls"  # whose files have the names that `kubectl create secret tls` gives them
    assert where == [("vopd-teacher-keys", "keys.json"), (tls, "tls.crt"), (tls, "tls.key")]
    assert secrets[str(Path(manifests.environment["HF_TOKEN_PATH"]).parent)] == "vopd-hub-token"


@each_overlay
def test_what_is_written_goes_to_a_volume(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifests = overlay(name)
    dockerfile = dockerfile_of(manifests.service)
    writable = {mount for mount, volume in manifests.mounts.items() if {"emptyDir", "claim"} & volume.keys()}
    assert {"/cache", "/tmp"} <= writable
    assert set(dockerfile.last("VOLUME").split()) <= manifests.mounts.keys()
    env = {**dockerfile.env, **manifests.environment}
    places = [value for key, value in env.items() if re.search(r"(HOME|_DIR|_ROOT)$", key)]
    places.append(str(settings_of(manifests, monkeypatch, tmp_path).golden_file))
    assert len(places) >= 6
    assert [place for place in places if f"/{place.split('/')[1]}" not in writable] == []
    assert "claim" in manifests.mounts["/cache"]  # the golden file outlives the pod


@each_overlay
def test_as_many_gpus_as_the_engine_takes(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifests = overlay(name)
    limits = manifests.container["resources"]["limits"]
    args = engine_args(manifests)
    needed = args.get("tensor_parallel_size", 1) * args.get("pipeline_parallel_size", 1)
    engine = settings_of(manifests, monkeypatch, tmp_path).engine
    assert int(limits.get(GPU, "0")) == {"transformers": 0, "vllm": needed}[engine]
    assert {"cpu": 0, "single-gpu": 1, "tensor-parallel": 2}[name] == int(limits.get(GPU, "0"))


@each_overlay
def test_memory_and_disk_are_bounded_and_hold_what_is_bounded_inside(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifests = overlay(name)
    resources = manifests.container["resources"]
    assert {"cpu", "memory", "ephemeral-storage"} <= resources["requests"].keys()
    assert {"memory", "ephemeral-storage"} <= resources["limits"].keys()
    for resource in ("memory", "ephemeral-storage"):
        assert num_bytes(resources["requests"][resource]) <= num_bytes(resources["limits"][resource])
    scratch = [volume["emptyDir"] for volume in manifests.mounts.values() if "emptyDir" in volume]
    in_memory = sum(num_bytes(volume["sizeLimit"]) for volume in scratch if volume.get("medium") == "Memory")
    on_disk = sum(num_bytes(volume["sizeLimit"]) for volume in scratch if volume.get("medium") != "Memory")
    queue_bytes = settings_of(manifests, monkeypatch, tmp_path).queue_bytes
    assert in_memory + queue_bytes < num_bytes(resources["limits"]["memory"])
    assert on_disk < num_bytes(resources["limits"]["ephemeral-storage"])
    shm = manifests.mounts.get("/dev/shm")  # of which vLLM needs more than the runtime's 64 MiB
    assert (shm is not None and shm["emptyDir"]["medium"] == "Memory") == (name != "cpu")


# ---------------------------------------------------------------- life


@each_overlay
def test_kubernetes_waits_for_the_drain_and_for_a_download(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifests = overlay(name)
    config = settings_of(manifests, monkeypatch, tmp_path)
    sleep, before_stop_s = manifests.container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    grace_s = manifests.pod["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= float(before_stop_s) + config.drain_timeout_s + 20  # for vLLM's processes to end
    assert seconds_until_given_up(manifests.container["startupProbe"]) >= 1800
    # Not being ready, as while it drains, is no reason to be killed; the watchdog finds an engine that hangs.
    assert manifests.container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert seconds_until_given_up(manifests.container["livenessProbe"]) >= 60
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        timings = manifests.container[probe]
        assert timings["timeoutSeconds"] <= timings["periodSeconds"]


@each_overlay
def test_a_node_can_be_drained_of_a_lone_teacher_and_of_one_that_is_broken(name: str) -> None:
    budget = overlay(name).one("PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert "minAvailable" not in budget
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


# ---------------------------------------------------------------- rights and secrets


@each_overlay
def test_the_pod_has_no_rights_that_it_does_not_need(name: str) -> None:
    """Beside the standard "restricted", which the namespace enforces, whatever goes further."""
    manifests = overlay(name)
    pod, container = manifests.pod["spec"], manifests.container
    user, group = map(int, dockerfile_of(manifests.service).last("USER").split(":"))
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": group,
        "fsGroup": 2000,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
    kinds = {key for volume in pod["volumes"] for key in volume if key != "name"}
    assert kinds == {"emptyDir", "configMap", "secret"}
    assert all(volume["secret"]["defaultMode"] == 0o440 for volume in pod["volumes"] if "secret" in volume)
    account = manifests.one("ServiceAccount", pod["serviceAccountName"])
    assert account["automountServiceAccountToken"] is pod["automountServiceAccountToken"] is False
    assert NAMESPACE["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_no_variable_of_a_service_can_be_taken_for_a_setting() -> None:
    """A Service `vopd-server` would set VOPD_SERVER_PORT=tcp://… in every pod beside it."""
    assert overlay("cpu").pod["spec"]["enableServiceLinks"] is False
    names = [service["metadata"]["name"] for service in overlay("cpu").all("Service")]
    assert not [name for name in names if f"{name}-".startswith(("vopd-server-", "vopd-client-"))]


@each_overlay
def test_no_secret_is_in_the_files_or_in_what_is_rendered(name: str) -> None:
    files = [path.read_text() for path in KUBERNETES.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not overlay(name).all("Secret")
    for text in (*files, yaml.safe_dump_all(overlay(name).documents)):
        assert not re.search(r"PRIVATE KEY|BEGIN CERTIFICATE|hf_\w{8}|\.[A-Za-z0-9_-]{43}\b|[0-9a-f]{64}", text)
        assert not re.search(r"^kind: Secret$|secretGenerator", text, re.MULTILINE)


@each_overlay
def test_the_image_is_that_of_the_compose_file(name: str) -> None:
    images = {service["image"] for service in compose_services()}
    assert overlay(name).container["image"] in images
    teacher = "teacher-cpu" if name == "cpu" else "teacher"
    assert overlay(name).container["image"] == compose()["services"][teacher]["image"]


# ---------------------------------------------------------------- the component, and the page


def test_the_overlay_of_the_page_renders_with_what_it_changes(own_overlay: Manifests) -> None:
    assert own_overlay.one("StatefulSet")["spec"]["replicas"] == 3
    assert own_overlay.container["image"] == "registry.example.org/vopd-teacher:0.1.0"
    changed = {"VOPD_SERVER_MODEL": "Qwen/Qwen3-14B", "VOPD_SERVER_QUEUE_TOKENS": "1048576"}
    assert own_overlay.environment == {**overlay("single-gpu").environment, **changed}
    # A changed setting has another name, and so is a rolling update.
    assert own_overlay.container["envFrom"] != overlay("single-gpu").container["envFrom"]
    assert own_overlay.documents != overlay("single-gpu").documents


def test_prometheus_finds_each_replica_under_the_job_of_the_alerts(own_overlay: Manifests) -> None:
    monitor = own_overlay.one("ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["metadata"]["namespace"] == "vopd"
    spec = monitor["spec"]
    assert spec.keys() == {"jobLabel", "selector", "endpoints"}
    labels = {service["metadata"]["name"]: service["metadata"]["labels"] for service in own_overlay.all("Service")}
    selector = spec["selector"]["matchLabels"]
    found = [name for name in labels if selects(selector, labels[name])]
    assert found == ["vopd-teacher-replicas"]
    jobs = re.findall(r'job="([^"]+)"', (REPOSITORY / "deploy" / "monitoring" / "alerts.yml").read_text())
    assert set(jobs) == {labels[found[0]][spec["jobLabel"]]}
    [endpoint] = spec["endpoints"]
    service_ports = {port["name"] for port in own_overlay.one("Service", found[0])["spec"]["ports"]}
    assert endpoint["port"] in service_ports
    assert endpoint["path"] == "/metrics"


def test_the_addresses_of_the_page_are_the_replicas_and_the_certificate_names_them(own_overlay: Manifests) -> None:
    commands = "".join(code_blocks(PAGE, "sh"))
    stateful_set = own_overlay.one("StatefulSet")
    service, namespace = stateful_set["spec"]["serviceName"], stateful_set["metadata"]["namespace"]
    port = own_overlay.ports["grpc"]
    told = re.findall(r"grpcs://(\S+?svc):(\d+)", commands)
    assert told == [(f"vopd-teacher-{index}.{service}.{namespace}.svc", str(port)) for index in (0, 1)]
    names = re.findall(r"DNS:([\w.*-]+)", commands)
    assert names == [f"vopd-teacher.{namespace}.svc", f"*.{service}.{namespace}.svc", "localhost"]


def test_the_page_names_files_labels_and_secrets_that_there_are() -> None:
    page = (REPOSITORY / "docs" / PAGE).read_text()
    commands = "".join(code_blocks(PAGE, "sh"))
    paths = re.findall(r"deploy/kubernetes/[\w./-]*\w", commands)
    assert paths
    assert all((REPOSITORY / path).exists() for path in paths)
    rows = re.findall(r"^\| `([\w-]+)` \|.*?([\d]+) GPU|^\| `([\w-]+)` \|", page, re.MULTILINE)
    listed = {named or unnamed: int(gpus or 0) for named, gpus, unnamed in rows}
    limits = {name: overlay(name).container["resources"]["limits"].get(GPU, "0") for name in OVERLAYS}
    assert listed == {name: int(limit) for name, limit in limits.items()}
    mounted = {volume["secret"]["secretName"] for volume in overlay("cpu").mounts.values() if "secret" in volume}
    assert set(re.findall(r"create secret \w+ ([\w-]+)", page)) == mounted
    assert "kubectl label namespace students vopd-teacher-client=true" in commands
    assert f"schemas of Kubernetes {OLDEST} and {NEWEST}" in page
