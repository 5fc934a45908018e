"""deploy/monitoring: what Prometheus and Grafana are told to look at is there, and the alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from conftest import REPOSITORY
from containers import BIN, compose
from scripted_status import busy_status
from vopd_server.metrics import Metrics

MONITORING = REPOSITORY / "deploy" / "monitoring"
ALERTS = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
RUNBOOK = REPOSITORY / "docs" / "operations.md"
PROMETHEUS_ITSELF = {"up", "ALERTS"}
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "$tenant": ".*"}
PROMQL_WORDS = {"and", "or", "unless", "by", "on", "without", "ignoring", "group_left", "group_right", "bool", "offset"}

each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])


def promtool(*arguments: str | Path, text: str | None = None) -> str:
    """What it says, for failures. Raises: AssertionError where it is not installed, or is not content."""
    path = shutil.which("promtool", path=f"{BIN}:/usr/bin:/usr/local/bin")
    assert path is not None, "no promtool in .venv/bin or on the PATH: run `make browser`"
    command = [path, *map(str, arguments)]
    ran = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def every_panel() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", [])


PANELS = [panel for panel in every_panel() if panel["type"] != "row"]
each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])


def expressions(panel: dict[str, Any]) -> list[str]:
    """Its queries, with something in the place of Grafana's variables."""
    found = []
    for target in panel["targets"]:
        expression = target["expr"]
        for variable, value in VARIABLES.items():
            expression = expression.replace(variable, value)
        found.append(expression)
    return found


def metrics_in(expression: str) -> set[str]:
    """The names of the metrics: what is left without matchers, ranges, label lists, functions and words."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", expression)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    names = re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\w|:)(?!\s*\()", bare)
    return {name for name in names if name not in PROMQL_WORDS}


@cache
def exposition() -> str:
    """Of a teacher that has had a call of every kind."""
    metrics = Metrics()
    metrics.call_ended("grpc", "Score", "OK", 0.1, "alice")
    metrics.rejected("alice", "RESOURCE_EXHAUSTED")
    metrics.sequence_scored("alice", context_tokens=1, completion_tokens=1)
    metrics.stage("alice", "queue", 0.1)
    metrics.bytes_moved("alice", "grpc", "sent", 1)
    return metrics.exposition(busy_status())[0].decode()


@cache
def exposed_names() -> set[str]:
    families = text_string_to_metric_families(exposition())
    return {sample.name for family in families for sample in family.samples}


def unknown(expression: str) -> set[str]:
    names = metrics_in(expression)
    assert names, expression
    return {name for name in names - exposed_names() - PROMETHEUS_ITSELF if not name.startswith("vllm:")}


# ---------------------------------------------------------------- Prometheus


def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    promtool("check", "config", MONITORING / "prometheus.yml")
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", MONITORING / "alerts.yml")


def test_the_alerts_fire_when_they_should_and_not_otherwise() -> None:
    promtool("test", "rules", MONITORING / "alerts_test.yml")


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases = yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
    tried = [(check["alertname"], bool(check.get("exp_alerts"))) for case in cases for check in case["alert_rule_test"]]
    assert set(tried) == {(alert["alert"], fires) for alert in ALERTS for fires in (True, False)}


def test_the_linter_of_metrics_finds_nothing_in_ours() -> None:
    ours = [line for line in exposition().splitlines() if re.search(r"(^|\s)vopd_", line)]
    assert len(ours) > 100
    promtool("check", "metrics", text="\n".join(ours) + "\n")


@each_alert
def test_an_alert_looks_at_what_there_is(alert: dict[str, Any]) -> None:
    assert unknown(alert["expr"]) == set()


@each_alert
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["alert"].startswith("Vopd")
    assert alert["labels"].keys() == {"severity"}
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert alert["annotations"].keys() == {"summary", "description", "runbook"}
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert page == "docs/operations.md"
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", anchor)
    if RUNBOOK.exists():
        headings = re.findall(r"^#+ (.+)$", RUNBOOK.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_each_alert_has_a_place_of_its_own_in_the_runbook() -> None:
    assert (
        len({alert["annotations"]["runbook"] for alert in ALERTS}) == len(ALERTS) == len({a["alert"] for a in ALERTS})
    )


def test_the_teachers_of_the_compose_file_are_watched_at_their_admin_port() -> None:
    [teachers, itself] = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    assert itself["job_name"] == "prometheus"
    [found] = teachers["dns_sd_configs"]
    services = compose()["services"]
    assert set(found["names"]) == {name for name in services if name.startswith("teacher")}
    for name in found["names"]:
        assert any(port.endswith(f":{found['port']}") for port in services[name]["ports"])
    for alert in ALERTS:
        assert set(re.findall(r'job="([^"]*)"', alert["expr"])) <= {teachers["job_name"]}


# ---------------------------------------------------------------- the dashboard


@each_panel
def test_a_panel_looks_at_what_there_is(panel: dict[str, Any]) -> None:
    for expression in expressions(panel):
        assert unknown(expression) == set()


@each_panel
def test_a_panel_says_what_it_shows_and_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0


def test_prometheus_understands_every_query_of_the_dashboard(tmp_path: Path) -> None:
    queries = [expression for panel in PANELS for expression in expressions(panel)]
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", path)


def test_panels_have_ids_and_places_of_their_own() -> None:
    ids = [panel["id"] for panel in every_panel()]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_rows_are_those_that_an_operator_looks_for() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Health", "Throughput", "Tenants", "Latency", "Engine", "Transport", "vLLM", "Process"]


def test_the_variables_list_what_there_is() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]))) - {"__rate_interval"}
    assert variables.keys() == used == {"datasource", "instance", "tenant"}
    for name in ("instance", "tenant"):
        query = variables[name]["query"]["query"]
        assert re.fullmatch(rf"label_values\((\w+), {name}\)", query)
        assert query.removeprefix("label_values(").partition(",")[0] in exposed_names()


def test_grafana_finds_its_data_and_its_dashboard() -> None:
    services = compose()["services"]
    [source] = yaml.safe_load((MONITORING / "grafana/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    assert source["uid"] == DASHBOARD["templating"]["list"][0]["current"]["value"]
    [provider] = yaml.safe_load((MONITORING / "grafana/dashboards/vopd.yml").read_text())["providers"]
    mounts = dict(reversed(volume.split(":")[:2]) for volume in services["grafana"]["volumes"])
    assert mounts["/etc/grafana/provisioning"] == "./deploy/monitoring/grafana"
    assert mounts[f"{provider['options']['path']}/dashboard.json"] == "./deploy/monitoring/dashboard.json"
