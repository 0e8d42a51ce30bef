"""The stack as compose YAML, for people who want to run it by compose, or to read what would run.

Owns: the translation of containerspec.py into compose's words.
In: settings. Out: YAML text that `docker compose config` accepts.
Never: holds a secret: volumes with users and token are made by `launcher up`.
"""

from __future__ import annotations

from typing import Any

from launcher import brokerconf
from launcher import containerspec as spec
from launcher.stack import BROKER, CONNECTOR
from launcher.stackdir import Settings


def _service(name: str, config: dict[str, Any]) -> dict[str, Any]:
    host = config["HostConfig"]
    health = config["Healthcheck"]
    return {
        "image": config["Image"],
        "container_name": name,
        "user": config["User"],
        "command": config["Cmd"],
        **({"environment": list(config["Env"])} if config.get("Env") else {}),
        "restart": host["RestartPolicy"]["Name"],
        "read_only": host["ReadonlyRootfs"],
        "cap_drop": host["CapDrop"],
        "security_opt": host["SecurityOpt"],
        "mem_limit": host["Memory"],
        "pids_limit": host["PidsLimit"],
        "tmpfs": [f"{path}:{options}" for path, options in host["Tmpfs"].items()],
        "volumes": list(host["Binds"]),
        "stop_grace_period": f"{config['StopTimeout']}s",
        "healthcheck": {
            # A dollar sign is compose's own: doubled, it reaches the shell.
            "test": [word.replace("$", "$$") for word in health["Test"]],
            "interval": f"{health['Interval'] // spec.SECOND}s",
            "timeout": f"{health['Timeout'] // spec.SECOND}s",
            "retries": health["Retries"],
            "start_period": f"{health['StartPeriod'] // spec.SECOND}s",
        },
        "logging": {"driver": host["LogConfig"]["Type"], "options": dict(host["LogConfig"]["Config"])},
    }


def compose(settings: Settings, own: brokerconf.Reading | None) -> dict[str, Any]:
    """The stack as compose's data."""
    name = settings.name
    broker = _service(spec.broker_name(name), spec.broker_spec(settings, own))
    broker["networks"] = {"private": {"aliases": ["mosquitto"]}}
    connector = _service(spec.connector_name(name), spec.connector_spec(settings, ca=settings.connector_ca is not None))
    connector["networks"] = {"private": {"aliases": ["connector"]}}
    connector["depends_on"] = {BROKER: {"condition": "service_healthy"}}
    volumes = (spec.config_volume(name), spec.data_volume(settings), spec.connector_volume(name))
    return {
        "name": name,
        "services": {BROKER: broker, CONNECTOR: connector},
        "networks": {"private": {"name": spec.network_name(name)}},
        "volumes": {volume: {"name": volume, "external": True} for volume in volumes},
    }


def compose_text(settings: Settings, own: brokerconf.Reading | None) -> str:
    """The stack as YAML."""
    import yaml  # noqa: PLC0415

    head = (
        f"# What `launcher up --name {settings.name}` runs. The volumes hold mosquitto.conf, users, rules and token:\n"
        "# `launcher up` makes them. Without the launcher: the compose.yaml of the project makes its own.\n"
    )
    return head + str(yaml.safe_dump(compose(settings, own), sort_keys=False, width=120))
