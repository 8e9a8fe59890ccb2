"""Dockerfile and compose files pass their linters, and keep what no schema demands.

``tests/e2e/test_deployment.py`` carries them out.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from backcast.settings import SECRETS, Settings
from tests.e2e.documents import ROOT
from tests.e2e.images import instructions
from tests.e2e.stack import compose

PROGRAMS = Path(sys.executable).parent
SERVICES: dict[str, dict[str, Any]] = compose()["services"]
OURS = ("service-1", "service-2", "migrate", "backcast", "trainer")
COMPOSE_FILES = ("docker-compose.yml", "docker-compose.cuda.yml")


def test_dockerfile_passes_its_linter() -> None:
    assert "hadolint ignore" not in (ROOT / "Dockerfile").read_text()
    _pass([PROGRAMS / "hadolint", "--no-color", "--failure-threshold", "style", "Dockerfile"])


def test_compose_files_follow_their_schema() -> None:
    schema = ["--builtin-schema", "vendor.compose-spec"]
    _pass([PROGRAMS / "check-jsonschema", *schema, *COMPOSE_FILES])


def test_dockerfile_builds_the_serving_image_unless_told_otherwise() -> None:
    stages = [
        rest.split()[-1] for name, rest in instructions(ROOT / "Dockerfile") if name == "FROM"
    ]
    assert stages == ["build", "build-train", "common", "train", "serve"]


def test_everything_is_installed_by_hash_but_torch_and_what_was_just_built() -> None:
    runs = [rest for name, rest in instructions(ROOT / "Dockerfile") if name == "RUN"]
    commands = [part for run in runs for part in run.split(" && ") if " install " in part]
    for command in commands:
        torch = shlex.split(command)[-2:] == ["-r", "requirements/torch.txt"]
        built = "--no-index --find-links /opt/wheel backcast" in command
        assert torch or built or "--no-deps --require-hashes" in command, command
    assert len(commands) == 5


def test_image_says_the_version_of_the_project() -> None:
    (label,) = (rest for name, rest in instructions(ROOT / "Dockerfile") if name == "LABEL")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pairs = dict(pair.split("=", 1) for pair in shlex.split(label))
    assert pairs["org.opencontainers.image.version"] == project["version"]
    assert pairs["org.opencontainers.image.description"] == project["description"]


SET_FOR_REPLICAS = {
    "BACKCAST_DRAIN_SECONDS",
    "BACKCAST_MAX_BODY",
    "BACKCAST_BATCHES_WAITING",
    "BACKCAST_REQUESTS_PER_SECOND",
    "BACKCAST_VECTORS_PER_SECOND",
}


def test_build_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copies = [rest for name, rest in instructions(ROOT / "Dockerfile") if name == "COPY"]
    own = [shlex.split(rest)[:-1] for rest in copies if "--from" not in rest]
    assert {source.rstrip("/") for sources in own for source in sources} == let_in


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened_and_bounded(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.keys() >= {"mem_limit", "pids_limit", "networks", "restart"}
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc"}


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_built_here_or_pinned_by_a_version(name: str) -> None:
    image = SERVICES[name]["image"]
    assert ("build" in SERVICES[name]) is (name in OURS)
    assert name in OURS or re.search(r":v?\d+\.\d+|:\d+-", image)


def test_what_services_name_is_defined() -> None:
    document = compose()
    for kind in ("networks", "secrets"):
        used = {name for service in SERVICES.values() for name in service.get(kind, ())}
        assert used == document[kind].keys()
    volumes = [v.split(":")[0] for s in SERVICES.values() for v in s.get("volumes", ())]
    assert {v for v in volumes if not v.startswith((".", "$"))} == document["volumes"].keys()
    waited = {name for s in SERVICES.values() for name in s.get("depends_on", ())}
    assert waited < SERVICES.keys()


def test_only_proxy_and_grafana_are_reached_from_outside_and_from_this_host_only() -> None:
    ports = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert ports == {
        "proxy": ["${LISTEN:-127.0.0.1:8000}:8000", "${ADMIN_LISTEN:-127.0.0.1:8001}:8001"],
        "grafana": ["${GRAFANA_LISTEN:-127.0.0.1:3000}:3000"],
    }
    inner = {name for name, of in compose()["networks"].items() if of.get("internal")}
    for name, service in SERVICES.items():
        assert name in ports or set(service["networks"]) <= inner


def test_passwords_come_as_files_and_are_never_in_the_repository() -> None:
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            assert "PASSWORD" not in variable or value.startswith("/run/secrets/")
    for name in OURS:
        by_file = {f"BACKCAST_{field.upper()}_FILE" for field in SECRETS}
        assert SERVICES[name]["environment"].keys() - SET_FOR_REPLICAS <= by_file
    files = [secret["file"] for secret in compose()["secrets"].values()]
    assert all(file.startswith("secrets/") for file in files)
    assert "/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_only_the_migration_connects_as_the_owner_of_the_tables() -> None:
    holders = {
        secret: {name for name, of in SERVICES.items() if secret in of.get("secrets", ())}
        for secret in ("owner_database_url", "owner_password", "postgres_password")
    }
    assert holders == {
        "owner_database_url": {"migrate"},
        "owner_password": {"postgres"},
        "postgres_password": {"postgres"},
    }


def test_replicas_share_artifacts_and_wait_for_the_schema() -> None:
    first, second = SERVICES["service-1"], SERVICES["service-2"]
    assert first == second
    assert "command" not in first  # the image's own
    migrated = {"condition": "service_completed_successfully"}
    for name in ("service-1", "service-2", "backcast", "trainer"):
        assert SERVICES[name]["depends_on"]["migrate"] == migrated
        assert "home:/var/lib/backcast" in SERVICES[name]["volumes"]


def test_replicas_drain_until_the_proxy_has_noticed_and_are_given_the_time_to_stop() -> None:
    proxy = (ROOT / "deploy" / "proxy" / "haproxy.cfg").read_text()
    (every, failed), *_ = re.findall(r"check inter (\d+)s fall (\d+)", proxy)
    drain = float(SERVICES["service-1"]["environment"]["BACKCAST_DRAIN_SECONDS"])
    finish = Settings.model_fields["shutdown_seconds"].default
    assert drain > int(every) * int(failed)
    assert int(SERVICES["service-1"]["stop_grace_period"].rstrip("s")) >= drain + finish + 10


def test_proxy_sends_a_replica_no_more_than_it_takes() -> None:
    proxy = (ROOT / "deploy" / "proxy" / "haproxy.cfg").read_text()
    (most,) = re.findall(r"default-server maxconn (\d+) ", proxy)
    assert int(most) < Settings.model_fields["max_connections"].default


def test_mounted_files_are_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source


def test_cuda_file_changes_the_build_and_adds_a_device() -> None:
    services = compose("docker-compose.cuda.yml")["services"]
    arguments = {rest.partition("=")[0] for name, rest in _arguments()}
    assert set(services) == set(OURS)
    for name, service in services.items():
        assert service["image"] != SERVICES[name]["image"]
        assert service["build"]["args"].keys() <= arguments
        assert ("deploy" in service) is (name not in {"migrate", "backcast"})


def _arguments() -> list[tuple[str, str]]:
    return [step for step in instructions(ROOT / "Dockerfile") if step[0] == "ARG"]


def _pass(command: list[Any]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_replica_has_the_memory_that_its_limits_let_it_take() -> None:
    """By the formula of docs/limits.md, for vectors of 256 numbers."""
    replica = SERVICES["service-1"]
    settings = Settings.load(
        max_body=int(replica["environment"]["BACKCAST_MAX_BODY"]),
        batches_waiting=int(replica["environment"]["BACKCAST_BATCHES_WAITING"]),
    )
    mib = 1 << 20
    batches = settings.batches_at_once + settings.batches_waiting
    rows = settings.max_batch * 2 * 4 * 256
    most = batches * (settings.max_body + rows) + (2 + settings.batches_waiting) * settings.max_body
    most += int(0.4 * settings.max_connections * mib)
    assert replica["mem_limit"] == "2g"
    assert most + 512 * mib < 2048 * mib  # the process with its libraries takes less than that
