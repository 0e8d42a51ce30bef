"""Commands to paste: MQTT clients that reach the broker through the public side.

Owns: the text of the commands, and which of them the installed Mosquitto clients can run.
In: address, CA file, user, a directory for small files. Out: `Snippet`s; a password only by the name of its file.
Never: puts a password on a command line, where every user of the machine could read it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.credentials import User
from launcher.mosquitto import find_program, program_version, write_private


@dataclass(frozen=True, slots=True)
class Place:
    """Where the clients connect, and where their files are."""

    host: str
    port: int
    path: str
    cafile: Path
    mqtt_port: int
    directory: Path
    user: str

    @property
    def url(self) -> str:
        """The address that MQTT clients want."""
        return f"wss://{self.host}:{self.port}{self.path}"

    @property
    def password_file(self) -> Path:
        """File with nothing but the password."""
        return self.directory / "password"


@dataclass(frozen=True, slots=True)
class Snippet:
    """One command (maybe several lines) for a shell, and what to know about it."""

    title: str
    command: str
    needs: str = ""


@dataclass(frozen=True, slots=True)
class MosquittoClients:
    """What the installed `mosquitto_sub` and `mosquitto_pub` can do."""

    version: tuple[int, int, int]
    websockets: bool


def write_files(place: Place, user: User) -> None:
    """The password file, and option files that the Mosquitto clients read from XDG_CONFIG_HOME."""
    place.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(place.password_file, user.password)
    for name in ("mosquitto_sub", "mosquitto_pub"):
        write_private(place.directory / name, f"-u {user.name}\n-P {user.password}\n")


def installed_mosquitto_clients() -> MosquittoClients | None:
    """Ask `mosquitto_sub` for its version and whether it knows `--ws` (from 2.1 on, when built with it)."""
    path = find_program("mosquitto_sub")
    if path is None or find_program("mosquitto_pub") is None:
        return None
    version = program_version(path)
    if version is None:
        return None
    try:
        done = subprocess.run([path, "--help"], capture_output=True, timeout=10, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return MosquittoClients(version, b"--ws" in done.stdout + done.stderr)


def python_command() -> str:
    """The interpreter that has paho, as short as it can be written here."""
    relative = os.path.relpath(sys.executable)
    return shlex.quote(min(sys.executable, relative, key=len) if not relative.startswith("..") else sys.executable)


def snippets(place: Place, clients: MosquittoClients | None) -> Sequence[Snippet]:
    """Everything to paste, subscribers first."""
    python = python_command()
    secret, ca = json.dumps(str(place.password_file)), json.dumps(str(place.cafile))
    topic = f"{place.user}/#"
    paho = f"""{python} - <<'END'
import paho.mqtt.client as mqtt
c = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, transport="websockets")
password = open({secret}).read()
c.username_pw_set("{place.user}", password)
c.tls_set({ca})
c.ws_set_options("{place.path}")
c.on_connect = lambda c, u, f, reason, p: print(reason, c.subscribe("{topic}"))
c.on_message = lambda c, u, m: print(m.topic, m.payload.decode(), flush=True)
c.connect("{place.host}", {place.port})
c.loop_forever()
END"""
    aiomqtt = f"""{python} - <<'END'
import asyncio, aiomqtt
password = open({secret}).read()
tls = aiomqtt.TLSParameters({ca})
async def main():
    async with aiomqtt.Client("{place.host}", {place.port}, tls_params=tls,
            transport="websockets", websocket_path="{place.path}",
            username="{place.user}", password=password) as client:
        await client.publish("{place.user}/hello", "hello from aiomqtt", qos=1)
asyncio.run(main())
END"""
    node = f"""node - <<'END'
const read = require("fs").readFileSync
const password = read({secret}, "utf8")
const ca = read({ca})
const c = require("mqtt").connect("{place.url}",
  {{ username: "{place.user}", password, ca }})
c.on("connect", () => c.publish("{place.user}/hello", "hello from MQTT.js",
  {{ qos: 1 }}, () => c.end()))
c.on("error", (e) => {{ console.error(e.message); process.exit(1) }})
END"""
    result = [
        Snippet("paho (Python), subscribes", paho),
        Snippet("aiomqtt (Python), publishes", aiomqtt, "pip install aiomqtt"),
        Snippet("MQTT.js (Node), publishes", node, "npm install mqtt"),
    ]
    options = f"XDG_CONFIG_HOME={shlex.quote(str(place.directory))} \\\n "
    if clients is not None and clients.websockets:
        where = f"--ws -h {place.host} -p {place.port} --cafile {shlex.quote(str(place.cafile))}"
        result += [
            Snippet("mosquitto_sub", f"{options} mosquitto_sub {where} \\\n  -t '{topic}' -v"),
            Snippet(
                "mosquitto_pub",
                f"{options} mosquitto_pub {where} \\\n  -q 1 -t {place.user}/hello -m 'hello from mosquitto'",
            ),
        ]
    elif clients is not None:
        where = f"-h 127.0.0.1 -p {place.mqtt_port}"
        version = ".".join(map(str, clients.version))
        note = f"{version} lacks 2.1's --ws: to the broker, past the tunnel"
        result += [
            Snippet("mosquitto_sub", f"{options} mosquitto_sub {where} -t '{topic}' -v", note),
            Snippet("mosquitto_pub", f"{options} mosquitto_pub {where} -q 1 -t {place.user}/hello -m hello", note),
        ]
    return result


def without_clients_note(place: Place) -> str:
    """What to say where the Mosquitto clients are not installed."""
    return (
        f"mosquitto_sub and mosquitto_pub are not installed here; from 2.1 on: --ws -h {place.host} -p {place.port} "
        f"--cafile {place.cafile}"
    )


def public_snippets(public: str, user: str, path: str = "/mqtt") -> Sequence[Snippet]:
    """Lines for clients that come in by the public host name: always wss and port 443, whatever the broker's ports are.

    The password stands in the environment variable MQTT_PASSWORD, so that it is not in a shell's history twice.
    """
    host, _, given = public.partition(":")
    port = given or "443"
    url, topic = f"wss://{host}:{port}{path}", f"{user}/hello"
    paho = f"""python3 - <<'END'
import os
import paho.mqtt.client as mqtt
c = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, transport="websockets")
c.username_pw_set("{user}", os.environ["MQTT_PASSWORD"])
c.tls_set()
c.ws_set_options("{path}")
c.on_connect = lambda c, u, f, reason, p: print(reason, c.subscribe("{user}/#"))
c.on_message = lambda c, u, m: print(m.topic, m.payload.decode(), flush=True)
c.connect("{host}", {port})
c.loop_forever()
END"""
    aiomqtt = f"""python3 - <<'END'
import asyncio, os, aiomqtt
async def main():
    async with aiomqtt.Client("{host}", {port}, tls_params=aiomqtt.TLSParameters(),
            transport="websockets", websocket_path="{path}",
            username="{user}", password=os.environ["MQTT_PASSWORD"]) as client:
        await client.publish("{topic}", "hello from aiomqtt", qos=1)
asyncio.run(main())
END"""
    node = f"""node - <<'END'
const c = require("mqtt").connect("{url}",
  {{ username: "{user}", password: process.env.MQTT_PASSWORD }})
c.on("connect", () => c.publish("{topic}", "hello from MQTT.js",
  {{ qos: 1 }}, () => c.end()))
c.on("error", (e) => {{ console.error(e.message); process.exit(1) }})
END"""
    mqttx = f"""mqttx sub -l wss -h {host} -p {port} --path {path} \\
  -u {user} -P "$MQTT_PASSWORD" -t '{user}/#'"""
    mosquitto = f"""mosquitto_sub --ws -h {host} -p {port} --tls-use-os-certs \\
  -o password-options -t '{user}/#' -v
# password-options: a file of mode 600 with the lines  -u {user}  and  -P <password>"""
    esp = f"""esp_mqtt_client_config_t config = {{
  .broker.address.uri = "{url}",
  .broker.verification.crt_bundle_attach = esp_crt_bundle_attach,
  .credentials.username = "{user}",
  .credentials.authentication.password = CONFIG_MQTT_PASSWORD,
  .session.keepalive = 45,
}};"""
    return [
        Snippet("paho (Python), subscribes", paho, "pip install paho-mqtt"),
        Snippet("aiomqtt (Python), publishes", aiomqtt, "pip install aiomqtt"),
        Snippet("MQTT.js (Node), publishes", node, "npm install mqtt"),
        Snippet("MQTTX command line", mqttx, f"as an application: host wss://, port {port}, path {path}"),
        Snippet("mosquitto_sub", mosquitto, "needs 2.1 or newer: 2.0 knows no --ws"),
        Snippet("ESP-IDF (esp-mqtt), in C", esp, "CONFIG_MQTT_TRANSPORT_WEBSOCKET_SECURE=y"),
    ]
