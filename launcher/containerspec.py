"""The two containers as the Docker API (and compose) wants them described.

Owns: names, labels, limits, mounts, health checks, the files that go into the volumes.
In: settings, dialect, texts. Out: plain data, the same for the same choices, so that a hash tells whether to recreate.
Never: talks to an engine; holds a secret (those are files in volumes).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

from launcher import brokerconf
from launcher.accounts import CHECK_TOPIC, HEALTH
from launcher.brokerconf import Dialect
from launcher.stack import BROKER, CONNECTOR, METRICS_PORT, WS_KEEP_ALIVE, WS_SUBPROTOCOL, proxy_option
from launcher.stackdir import Settings

Spec = dict[str, Any]

LABEL_STACK = "tunnel-launcher.stack"
LABEL_ID = "tunnel-launcher.id"
LABEL_SERVICE = "tunnel-launcher.service"
LABEL_HASH = "tunnel-launcher.hash"
LABEL_SETTINGS = "tunnel-launcher.settings"

LABEL_DEFAULTS = "tunnel-connector.origin-defaults"
"""Of the connector's image: it takes the variables of `connector_environment`. cloudflared's has no such label, and a
broker that waits for a PROXY header would wait in vain."""

LABEL_SOURCE = "tunnel-launcher.source"
"""Of an image that `up` built: the hash of what it was built from."""

BROKER_UID = 1883
CONNECTOR_UID = 65532
CONFIG, DATA = "/mosquitto/config", "/mosquitto/data"
CONNECTOR_DIR = "/etc/connector"
TOKEN = f"{CONNECTOR_DIR}/token"
CA = f"{CONNECTOR_DIR}/edge-ca.pem"

SECOND = 1_000_000_000
MIB = 1024 * 1024
BROKER_MEMORY = 512 * MIB
"""Above a thousand full queues of small messages; a broker that reaches it is restarted instead of the whole machine
swapping."""

CONNECTOR_MEMORY = 512 * MIB
"""Ten thousand idle WebSockets stay below it."""

PIDS = 64
"""Both have one process and a handful of threads; health checks add a few."""

BROKER_STOP_SECONDS = 30
CONNECTOR_STOP_SECONDS = 40
"""The connector's default grace period is 30 s; the broker writes its database within these."""

LOG_OPTIONS = {"max-size": "10m", "max-file": "3"}
RESTART = "unless-stopped"

HEALTH_COMMAND = (
    f"XDG_CONFIG_HOME={CONFIG}/health mosquitto_rr -h 127.0.0.1 -p 1883 -q 1"
    f" -t {CHECK_TOPIC} -e {CHECK_TOPIC} -m ok -W 3 >/dev/null"
)
"""An authenticated CONNECT and a QoS 1 message to itself, with the clients that the image has. The password is in an
option file that only the broker's user can read."""

ALIVE_COMMAND = (
    "mosquitto_sub -h 127.0.0.1 -p {port} -t selfcheck/alive -E -W 3 >/dev/null 2>&1; "
    "case $? in 0|4|5|27|134|135) exit 0;; *) exit 1;; esac"
)
"""For a foreign mosquitto.conf, whose users we do not know: an answer to CONNECT is life, also a refusal."""

READY_COMMAND = ["cloudflared", "tunnel", "--metrics", f"127.0.0.1:{METRICS_PORT}", "ready"]


def broker_name(stack: str) -> str:
    """Container name of the broker."""
    return f"{stack}-broker"


def connector_name(stack: str) -> str:
    """Container name of the connector."""
    return f"{stack}-connector"


def network_name(stack: str) -> str:
    """The private network."""
    return f"{stack}-network"


def config_volume(stack: str) -> str:
    """mosquitto.conf, users, rules."""
    return f"{stack}-broker-config"


def data_volume(settings: Settings) -> str:
    """The broker's database: what has to survive."""
    return settings.data_volume or f"{settings.name}-broker-data"


def connector_volume(stack: str) -> str:
    """The token."""
    return f"{stack}-connector-secrets"


def labels(settings: Settings, service: str) -> dict[str, str]:
    """How we find our things again."""
    return {LABEL_STACK: settings.name, LABEL_ID: settings.id, LABEL_SERVICE: service}


def _host(settings: Settings, volumes: Sequence[str], tmpfs: Sequence[str], memory: int) -> Spec:
    return {
        "NetworkMode": network_name(settings.name),
        "Binds": list(volumes),
        "Tmpfs": dict.fromkeys(tmpfs, "rw,noexec,nosuid,size=16m,mode=1777"),
        "RestartPolicy": {"Name": RESTART},
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "Memory": memory,
        "PidsLimit": PIDS,
        "LogConfig": {"Type": "json-file", "Config": LOG_OPTIONS},
    }


def broker_port(own: brokerconf.Reading | None) -> int:
    """Port of the plain listener that the health check uses."""
    if own is None:
        return 1883
    plain = [listener.port for listener in own.listeners if listener.protocol == "mqtt"]
    return plain[0] if plain else 1883


def broker_spec(settings: Settings, own: brokerconf.Reading | None) -> Spec:
    """The broker's container."""
    name = settings.name
    command = HEALTH_COMMAND if own is None else ALIVE_COMMAND.format(port=broker_port(own))
    host = _host(
        settings,
        [f"{config_volume(name)}:{CONFIG}", f"{data_volume(settings)}:{DATA}"],
        ["/mosquitto/log", "/tmp"],  # noqa: S108 - inside the container
        BROKER_MEMORY,
    )
    return {
        "Image": settings.broker_image,
        "User": f"{BROKER_UID}:{BROKER_UID}",
        "Cmd": ["/usr/sbin/mosquitto", "-c", f"{CONFIG}/mosquitto.conf"],
        "Labels": labels(settings, BROKER),
        "StopTimeout": BROKER_STOP_SECONDS,
        "Healthcheck": {
            "Test": ["CMD-SHELL", command],
            "Interval": 5 * SECOND,
            "Timeout": 5 * SECOND,
            "Retries": 3,
            "StartPeriod": 10 * SECOND,
        },
        "HostConfig": host,
        "NetworkingConfig": {"EndpointsConfig": {network_name(name): {"Aliases": ["mosquitto"]}}},
    }


def connector_command(settings: Settings, *, ca: bool) -> list[str]:
    """What follows the image's entry point. The token's file, never the token."""
    words = ["tunnel", "--no-autoupdate", "--metrics", f"0.0.0.0:{METRICS_PORT}", *settings.connector_args]
    if ca:
        words += ["--cacert", CA]
    return [*words, "run", "--token-file", TOKEN]


def connector_environment(settings: Settings) -> list[str]:
    """What rules of a dashboard cannot say, for a connector that understands it; others ignore it."""
    words = [f"TUNNEL_WS_KEEPALIVE={WS_KEEP_ALIVE}", f"TUNNEL_WS_SUBPROTOCOLS={WS_SUBPROTOCOL}"]
    if settings.proxied_port:
        words.append(f"TUNNEL_PROXY_PROTOCOL={proxy_option(settings)}")
    return words


def connector_spec(settings: Settings, *, ca: bool) -> Spec:
    """The connector's container."""
    name = settings.name
    host = _host(settings, [f"{connector_volume(name)}:{CONNECTOR_DIR}"], ["/tmp"], CONNECTOR_MEMORY)  # noqa: S108
    return {
        "Image": settings.connector_image,
        "User": f"{CONNECTOR_UID}:{CONNECTOR_UID}",
        "Cmd": connector_command(settings, ca=ca),
        "Env": connector_environment(settings),
        "Labels": labels(settings, CONNECTOR),
        "StopTimeout": CONNECTOR_STOP_SECONDS,
        "Healthcheck": {
            "Test": ["CMD", *READY_COMMAND],
            "Interval": 30 * SECOND,
            "Timeout": 10 * SECOND,
            "Retries": 3,
            "StartPeriod": 30 * SECOND,
        },
        "HostConfig": host,
        "NetworkingConfig": {"EndpointsConfig": {network_name(name): {"Aliases": ["connector"]}}},
    }


def digest(spec: Spec, *texts: str) -> str:
    """Tells two specifications (and the texts of files that need a restart) apart."""
    plain = json.dumps(spec, sort_keys=True) + "\0".join(texts)
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


def sealed(settings: Settings, secret: str) -> str:
    """What may stand in for a secret inside `digest`: says only whether it changed."""
    return hashlib.sha256(f"{settings.id}\0{secret}".encode()).hexdigest()


def broker_shape(settings: Settings) -> brokerconf.Shape:
    """The broker's configuration inside its container."""
    return brokerconf.Shape(
        listeners=(brokerconf.Listener(1883), brokerconf.Listener(9001, "websockets")),
        directory=f"{CONFIG}/",
        data=f"{DATA}/",
        written_by="`launcher up`",
        anonymous=settings.allow_anonymous,
        save_each_change=settings.durability == "each",
        proxy_protocol=bool(settings.proxied_port),
    )


def broker_conf(dialect: Dialect, settings: Settings) -> str:
    """Text of mosquitto.conf inside the container."""
    return brokerconf.configuration(dialect, broker_shape(settings))


def account_files(passwords: str, acl: str, health_password: str) -> dict[str, str]:
    """Files of the broker that a reload reads again, and those of its health check."""
    options = f"-u {HEALTH}\n-P {health_password}\n"
    return {
        "passwords": passwords,
        "acl": acl,
        "health/mosquitto_rr": options,
        "health/mosquitto_sub": options,
        "health/password": health_password,
    }


def archive(files: Mapping[str, str | bytes], uid: int) -> bytes:
    """A tar of private files owned by `uid`, with the directories above them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for folder in sorted({path.rpartition("/")[0] for path in files} - {""}):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, 0o700, uid, uid
            tar.addfile(entry)
        for path, text in files.items():
            data = text if isinstance(text, bytes) else text.encode()
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode, entry.uid, entry.gid = len(data), 0o600, uid, uid
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
