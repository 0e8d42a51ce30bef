"""deploy/, compose.yaml and Dockerfile: a small schema for what is used of each, and that they agree with the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import containerspec
from launcher.accounts import CHECK_TOPIC
from launcher.composefile import compose, compose_text
from launcher.stackdir import BROKER_IMAGE, CONNECTOR_IMAGE, Settings

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"

# A JSON schema in short: a dict lists the allowed keys (`!` marks the required ones), a list holds items of one kind, a
# type or a tuple of them is a value, None is anything.
Schema = Any
LABELS = {"*": str}
META = {"!name": str, "labels": LABELS, "annotations": LABELS, "namespace": str}
SELECTOR = {"!matchLabels": LABELS}
PROBE = {
    "httpGet": {"!path": str, "!port": (int, str)},
    "exec": {"!command": [str]},
    "initialDelaySeconds": int,
    "periodSeconds": int,
    "timeoutSeconds": int,
    "failureThreshold": int,
}
CONTAINER = {
    "!name": str,
    "!image": str,
    "command": [str],
    "args": [str],
    "env": [{"!name": str, "!value": str}],
    "ports": [{"!name": str, "!containerPort": int}],
    "startupProbe": PROBE,
    "readinessProbe": PROBE,
    "livenessProbe": PROBE,
    "!resources": {"!requests": {"cpu": str, "!memory": str}, "!limits": {"!memory": str}},
    "!securityContext": {
        "!allowPrivilegeEscalation": bool,
        "!readOnlyRootFilesystem": bool,
        "!capabilities": {"!drop": [str]},
    },
    "volumeMounts": [{"!name": str, "!mountPath": str, "readOnly": bool, "subPath": str}],
}
POD = {
    "!metadata": {"!labels": LABELS, "annotations": LABELS},
    "!spec": {
        "!automountServiceAccountToken": bool,
        "enableServiceLinks": bool,
        "!terminationGracePeriodSeconds": int,
        "!securityContext": {
            "!runAsNonRoot": bool,
            "!runAsUser": int,
            "runAsGroup": int,
            "fsGroup": int,
            "fsGroupChangePolicy": str,
            "!seccompProfile": {"!type": str},
        },
        "topologySpreadConstraints": [
            {"!maxSkew": int, "!topologyKey": str, "!whenUnsatisfiable": str, "!labelSelector": SELECTOR}
        ],
        "initContainers": [CONTAINER],
        "!containers": [CONTAINER],
        "volumes": [
            {
                "!name": str,
                "secret": {"!secretName": str, "defaultMode": int},
                "emptyDir": {"sizeLimit": str},
            }
        ],
    },
}
PORTS = [{"!port": int, "!protocol": str}]
KINDS: dict[tuple[str, str], Schema] = {
    ("apps/v1", "Deployment"): {
        "!replicas": int,
        "!selector": SELECTOR,
        "strategy": {"!type": str, "rollingUpdate": {"maxUnavailable": int, "maxSurge": int}},
        "!template": POD,
    },
    ("apps/v1", "StatefulSet"): {
        "!serviceName": str,
        "!replicas": int,
        "!selector": SELECTOR,
        "!template": POD,
        "volumeClaimTemplates": [
            {"!metadata": META, "!spec": {"!accessModes": [str], "!resources": {"!requests": {"!storage": str}}}}
        ],
    },
    ("v1", "Service"): {
        "clusterIP": str,
        "!selector": LABELS,
        "!ports": [{"!name": str, "!port": int, "!targetPort": (int, str)}],
    },
    ("policy/v1", "PodDisruptionBudget"): {"minAvailable": int, "maxUnavailable": int, "!selector": SELECTOR},
    ("networking.k8s.io/v1", "NetworkPolicy"): {
        "!podSelector": SELECTOR,
        "!policyTypes": [str],
        "ingress": [{"from": [{"podSelector": SELECTOR}], "ports": PORTS}],
    },
}


def complaints(value: Any, schema: Schema, where: str) -> list[str]:
    if schema is None:
        return []
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where}: not a mapping"]
        known = {key.lstrip("!"): rule for key, rule in schema.items()}
        found = [f"{where}: {key[1:]} is missing" for key in schema if key.startswith("!") and key[1:] not in value]
        for key, one in value.items():
            rule = known.get(key, known.get("*", KeyError))
            found += [f"{where}: {key} is unknown"] if rule is KeyError else complaints(one, rule, f"{where}.{key}")
        return found
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{where}: not a list with something in it"]
        return [text for index, one in enumerate(value) for text in complaints(one, schema[0], f"{where}[{index}]")]
    if isinstance(value, bool) and schema is not bool:
        return [f"{where}: a boolean"]
    return [] if isinstance(value, schema) else [f"{where}: {value!r} is no {schema}"]


def objects() -> dict[tuple[str, str], dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    kustomization = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text())
    for name in kustomization["resources"]:
        for one in yaml.safe_load_all((KUBERNETES / "base" / name).read_text()):
            key = (one["kind"], one["metadata"]["name"])
            assert key not in found
            found[key] = one
    return found


def test_the_schema_itself_complains() -> None:
    assert complaints({"a": 1}, {"!b": int}, "x") == ["x: b is missing", "x: a is unknown"]
    assert complaints({"b": True}, {"!b": int}, "x") == ["x.b: a boolean"]
    assert complaints({"b": []}, {"b": [str]}, "x") == ["x.b: not a list with something in it"]


def test_kubernetes_objects_are_what_they_should_be() -> None:
    for (kind, name), one in objects().items():
        assert set(one) == {"apiVersion", "kind", "metadata", "spec"}, (kind, name)
        assert not complaints(one["metadata"], META, name)
        assert not complaints(one["spec"], KINDS[one["apiVersion"], kind], f"{kind} {name}")


def test_kubernetes_pods_are_locked_down_and_selected() -> None:
    found = objects()
    for (kind, name), one in found.items():
        spec = one["spec"]
        if kind not in {"Deployment", "StatefulSet"}:
            continue
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        budget = found["PodDisruptionBudget", name]["spec"]["selector"]["matchLabels"]
        assert budget.items() <= labels.items()
        pod = spec["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        volumes |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
        for container in pod["containers"] + pod.get("initContainers", []):
            context = container["securityContext"]
            assert context == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            ports = {port["name"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if "httpGet" in container.get(probe, {}):
                    assert container[probe]["httpGet"]["port"] in ports
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    service = found["Service", "mosquitto"]["spec"]
    broker = found["StatefulSet", "mosquitto"]["spec"]["template"]
    assert service["selector"].items() <= broker["metadata"]["labels"].items()
    names = {port["name"] for port in broker["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["ports"]} <= names
    connector = found["Deployment", "connector"]["spec"]["template"]["spec"]
    assert connector["terminationGracePeriodSeconds"] > 30
    assert connector["securityContext"]["runAsUser"] == containerspec.CONNECTOR_UID


def resolve(path: str, one: dict[str, Any]) -> Any:
    value: Any = one
    for part in path.strip("/").split("/"):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


@pytest.mark.parametrize("overlay", sorted(path.name for path in (KUBERNETES / "overlays").iterdir()))
def test_overlays_patch_what_is_there(overlay: str) -> None:
    text = (KUBERNETES / "overlays" / overlay / "kustomization.yaml").read_text()
    kustomization = yaml.safe_load(text)
    found = objects()
    assert kustomization["kind"] == "Kustomization"
    for resource in kustomization["resources"]:
        assert (KUBERNETES / "overlays" / overlay / resource / "kustomization.yaml").is_file()
    for replica in kustomization.get("replicas", []):
        assert ("Deployment", replica["name"]) in found
    removed = set()
    for patch in kustomization["patches"]:
        key = (patch["target"]["kind"], patch["target"]["name"])
        change = yaml.safe_load(patch["patch"])
        if isinstance(change, dict):
            assert change["$patch"] == "delete"
            assert (change["kind"], change["metadata"]["name"]) == key
            assert change["apiVersion"] == found[key]["apiVersion"]
            removed.add(key)
            continue
        for operation in change:
            assert operation["op"] == "replace"
            old = resolve(operation["path"], found[key])
            assert isinstance(operation["value"], type(old))
    if overlay == "clustered":
        assert all(key in removed for key in found if key[1] in {"mosquitto", "broker"})


def test_images_are_pinned_everywhere() -> None:
    texts = [path.read_text() for path in [*(ROOT / "deploy").rglob("*.yaml"), ROOT / "compose.yaml"]]
    assert not any(":latest" in text for text in texts)
    statefulset = objects()["StatefulSet", "mosquitto"]["spec"]["template"]["spec"]["containers"][0]
    assert statefulset["image"] == BROKER_IMAGE
    compose_file = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert BROKER_IMAGE in compose_file["services"]["mosquitto"]["image"]
    assert CONNECTOR_IMAGE in compose_file["services"]["cloudflared"]["image"]


def test_the_health_check_is_the_same_everywhere() -> None:
    def words(command: str) -> list[str]:
        return command.split()

    wanted = words(containerspec.HEALTH_COMMAND)
    assert CHECK_TOPIC in wanted
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert words(services["mosquitto"]["healthcheck"]["test"][1]) == wanted
    container = objects()["StatefulSet", "mosquitto"]["spec"]["template"]["spec"]["containers"][0]
    assert words(container["readinessProbe"]["exec"]["command"][2]) == wanted


def test_compose_file_is_hardened() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for name, one in services.items():
        assert one["read_only"] is True, name
        assert one["cap_drop"] == ["ALL"]
        assert one["user"] in {"1883:1883", "65532:65532"}
        assert "ports" not in one
    assert "TOKEN" not in str(services["cloudflared"])
    assert services["cloudflared"]["depends_on"]["mosquitto"] == {"condition": "service_healthy"}


def test_config_as_compose_says_what_the_engine_is_told() -> None:
    settings = Settings(name="x")
    data = compose(settings, None)
    assert yaml.safe_load(compose_text(settings, None)) == data
    assert data["services"]["broker"]["image"] == BROKER_IMAGE
    assert "eyJ" not in compose_text(settings, None)
    assert data["services"]["connector"]["command"][-2:] == ["--token-file", containerspec.TOKEN]


UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_are_well_formed(unit: Path) -> None:
    section, seen = "", {}
    for number, line in enumerate(unit.read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            section = line
            assert section in {"[Unit]", "[Service]", "[Install]"}
            continue
        assert re.fullmatch(r"[A-Z][A-Za-z]+=.*", line), (number, line)
        seen.setdefault(section, {}).setdefault(line.partition("=")[0], line.partition("=")[2])
    assert seen["[Unit]"]["Description"]
    assert seen["[Install]"]["WantedBy"] == "multi-user.target"
    assert "--token-file %d/token" in seen["[Service]"]["ExecStart"]
    assert seen["[Service]"]["LoadCredential"].startswith("token:")


def test_units_pass_systemds_own_check() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("NO systemd-analyze HERE: units were only read")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, UNITS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    said = [
        line for line in (done.stdout + done.stderr).splitlines()
        if "is not executable" not in line and "docker.service" not in line and any(unit.name in line for unit in UNITS)
    ]  # fmt: skip
    assert not said, said


def test_dockerfile_needs_nothing_that_old_engines_lack() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "# syntax" not in text
    assert "--link" not in text
    assert "--mount" not in text
    assert "<<" not in text
    assert "--require-hashes" in text
    assert "USER 65532:65532" in text
    version = containerspec.Settings().connector_image.rpartition(":")[2]
    assert f"ARG VERSION={version}" in text


@pytest.mark.parametrize("folder", ["base", "overlays/production", "overlays/clustered"])
def test_kustomize_builds_what_the_schema_takes(folder: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("NO kubectl HERE: the overlays were only read")
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    kinds = sorted(one["kind"] for one in built)
    for one in built:
        assert one["metadata"]["namespace"] == "tunnel"
        assert not complaints(one["spec"], KINDS[one["apiVersion"], one["kind"]], one["metadata"]["name"])
    if folder == "overlays/clustered":
        assert kinds == ["Deployment", "NetworkPolicy", "PodDisruptionBudget"]
    else:
        assert len(kinds) == 7
        assert "newTag" not in done.stdout
        assert done.stdout.count(f"image: {CONNECTOR_IMAGE}") == 2
    if folder == "overlays/production":
        assert "storage: 20Gi" in done.stdout
