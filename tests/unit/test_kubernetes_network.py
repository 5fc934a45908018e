"""deploy/kubernetes: selectors find the pods, ports are the server's, and who is let in and out."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manifests import OVERLAYS, Document, Manifests, overlay, selects, settings_of

each_overlay = pytest.mark.parametrize("name", OVERLAYS)


# ---------------------------------------------------------------- labels, ports


@each_overlay
def test_every_selector_finds_the_pods(name: str) -> None:
    manifests = overlay(name)
    labels = manifests.pod["metadata"]["labels"]
    stateful_set = manifests.one("StatefulSet")["spec"]
    spreads = stateful_set["template"]["spec"]["topologySpreadConstraints"]
    selectors = [
        *(owner["selector"]["matchLabels"] for owner in (stateful_set, manifests.one("PodDisruptionBudget")["spec"])),
        *(spread["labelSelector"]["matchLabels"] for spread in spreads),
        *(policy["spec"]["podSelector"]["matchLabels"] for policy in manifests.all("NetworkPolicy")),
        *(service["spec"]["selector"] for service in manifests.all("Service")),
    ]
    assert len(selectors) >= 7
    assert all(selects(selector, labels) for selector in selectors)


@each_overlay
def test_ports_are_those_of_the_settings_wherever_they_stand(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifests = overlay(name)
    config = settings_of(manifests, monkeypatch, tmp_path)
    assert manifests.ports == {"grpc": config.port, "http": config.http_port, "admin": config.admin_port}
    assert {config.host, config.admin_host} == {"0.0.0.0"}
    for service in manifests.all("Service"):
        exposed = {port["targetPort"]: port["port"] for port in service["spec"]["ports"]}
        assert exposed.items() <= manifests.ports.items()
        assert ("admin" in exposed) == (service["spec"].get("clusterIP") == "None")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert manifests.container[probe]["httpGet"]["port"] == "admin"  # the others speak TLS


@each_overlay
def test_each_replica_has_a_name_by_the_headless_service(name: str) -> None:
    manifests = overlay(name)
    service = manifests.one("Service", manifests.one("StatefulSet")["spec"]["serviceName"])["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True


# ---------------------------------------------------------------- who may talk to whom


def admitted(manifests: Manifests, direction: str) -> Iterator[tuple[Any, Document]]:
    """Each port and each peer that some policy lets through."""
    peers_key = {"ingress": "from", "egress": "to"}[direction]
    for policy in manifests.all("NetworkPolicy"):
        for rule in policy["spec"].get(direction, []):
            assert rule["ports"], "no ports are all ports"
            assert rule[peers_key], "no peers are everyone"
            yield from ((port["port"], peer) for port in rule["ports"] for peer in rule[peers_key])


@each_overlay
def test_clients_reach_what_answers_them_and_monitoring_the_metrics(name: str) -> None:
    manifests = overlay(name)
    client = {"vopd-teacher-client": "true"}
    clients = [{"podSelector": {"matchLabels": client}}, {"namespaceSelector": {"matchLabels": client}}]
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    found: dict[str, list[Document]] = {port: [] for port in manifests.ports}
    for port, peer in admitted(manifests, "ingress"):
        found[port].append(peer)
    assert found == {"grpc": clients, "http": clients, "admin": [monitoring]}
    # A direction that a policy of the pod does not name is not restricted by it.
    directions = [policy["spec"]["policyTypes"] for policy in manifests.all("NetworkPolicy")]
    assert ["Ingress", "Egress"] in directions


@each_overlay
def test_a_teacher_reaches_names_and_the_model_hub_and_nothing_inside(name: str) -> None:
    manifests = overlay(name)
    allowed = [(port, peer["ipBlock"]) for port, peer in admitted(manifests, "egress") if "ipBlock" in peer]
    elsewhere = [(port, peer) for port, peer in admitted(manifests, "egress") if "ipBlock" not in peer]

    def reaches(address: str, port: int) -> bool:
        ip = ipaddress.ip_address(address)
        return any(
            port == open_port
            and ip in ipaddress.ip_network(block["cidr"])
            and not any(ip in ipaddress.ip_network(hole) for hole in block.get("except", []))
            for open_port, block in allowed
        )

    kube_system = {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}
    assert {port for port, _ in elsewhere} == {53}
    assert all(peer["namespaceSelector"] == kube_system for _, peer in elsewhere)
    assert reaches("169.254.20.10", 53)
    downloads = name != "cpu"  # whose image holds the model
    assert reaches("198.51.100.7", 443) == reaches("2001:db8::7", 443) == downloads
    inside = ("10.1.2.3", "100.64.0.1", "172.20.0.1", "192.168.1.1", "169.254.169.254", "fd00::1", "fe80::1")
    assert not any(reaches(address, 443) for address in inside)
    assert not any(reaches("198.51.100.7", port) for port in (22, 80, 53, 6443))
    assert (manifests.environment.get("HF_HUB_OFFLINE") == "1") == (not downloads)
