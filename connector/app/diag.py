"""`connector tunnel diag`: what somebody who looks for a fault would ask for, in one zip file.

Owns: finding the instance, the jobs and their limits, the file's names. In: a Call. Out: a zip in the directory.
Never: a token (the instance does not tell it); stops because one job failed (`task-result.json` says so).

Names and contents are cloudflared's, so that it can ask this connector and this program can ask cloudflared.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from uuid import UUID

from connector.app.command_table import Call
from connector.app.config import RunConfig, split_address
from connector.app.log_files import rotated
from connector.app.logs import stderr_logger
from connector.app.metrics_server import known_addresses
from connector.errors import ConnectorError
from connector.wire.token import Token

if TYPE_CHECKING:
    from connector.app.logs import Logger

REQUEST_SECONDS = 15.0
TOTAL_SECONDS = 45.0
"""Limits of cloudflared: one request, and all jobs together; what is left over then is skipped."""

MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of one answer: a heap profile of a big process has a few."""

LOG_SINCE = timedelta(days=14)
LOG_LINES = "10000"
TRACE_HOPS = "5"
TRACE_SECONDS = "5"
_HOSTS = ("region1.v2.argotunnel.com", "region2.v2.argotunnel.com")
_SERVICE = "cloudflared.service"
_SERVICE_FILE = Path("/etc/systemd/system") / _SERVICE
_SERVICE_LOG = Path("/var/log/cloudflared.err")


class DiagError(ConnectorError):
    """A job, or the search for the instance, failed."""


class Instance(NamedTuple):
    """A running connector: where it answers, and what /diag/tunnel says."""

    address: str
    state: dict[str, Any]


def diag(call: Call) -> int:
    """Collect; the status is 0 also when no instance was found, as in cloudflared."""
    flags = call.flags
    log = stderr_logger(json_lines=flags.text("output") == "json", no_color=bool(call.environ.get("NO_COLOR")))
    address = flags.text("metrics") if flags.is_set("metrics") else ""
    if not address:
        log.info("If your instance is running in a Docker/Kubernetes environment you need to set up port forwarding.")
    instance = _find(address, log)
    if instance is None:
        return 0
    container, pod = flags.text("diag-container-id"), flags.text("diag-pod-id")
    client = _Client(instance.address)
    region = flags.text("region")
    jobs: list[tuple[str, str, Callable[[], dict[str, bytes]]]] = [
        ("tunnel state", "", lambda: {"tunnelstate.json": _pretty(instance.state)}),
        ("system information", "no-diag-system", lambda: {"systeminformation.json": client.json("/diag/system")}),
        ("goroutine profile", "no-diag-runtime", lambda: {"goroutine.pprof": client.get("/debug/pprof/goroutine")}),
        ("heap profile", "no-diag-runtime", lambda: {"heap.pprof": client.get("/debug/pprof/heap")}),
        ("metrics", "no-diag-metrics", lambda: {"metrics.txt": client.get("/metrics")}),
        ("log information", "no-diag-logs", lambda: _logs(client, container, pod)),
        ("raw network information", "no-diag-network", lambda: {"raw-network.txt": _raw_routes(routes())}),
        ("network information", "no-diag-network", lambda: {"network.json": _pretty(_hops(routes()))}),
        ("cli configuration", "", lambda: {"cli-configuration.json": client.json("/diag/configuration")}),
        ("configuration", "", lambda: {"configuration.json": client.json("/config")}),
        ("connectivity pre-checks", "no-diag-network", lambda: {"prechecks.json": _prechecks(region)}),
    ]  # fmt: skip
    traced: list[dict[str, str]] = []

    def routes() -> dict[str, str]:
        if not traced:
            traced.append(_trace_routes())
        return traced[0]

    began = datetime.now(UTC)
    files: dict[str, bytes] = {}
    report: dict[str, dict[str, str]] = {}
    for name, switch, job in jobs:
        if switch and flags.value(switch):
            continue
        if datetime.now(UTC) - began > timedelta(seconds=TOTAL_SECONDS):
            report[name] = {"result": "failure", "error": f"not begun within {TOTAL_SECONDS:g} seconds"}
            continue
        log.info(f"Collecting {name}...")
        try:
            files.update(job())
        except (ConnectorError, OSError, HTTPException, subprocess.SubprocessError, ValueError) as error:
            log.error(f"Job: {name} finished with error.", error=str(error))
            report[name] = {"result": "failure", "error": str(error)}
        else:
            log.info(f"Collected {name}.")
            report[name] = {"result": "success"}
    files["task-result.json"] = _pretty(report)
    path = Path(f"cloudflared-diag-{began.strftime('%Y-%m-%dT%H-%M-%SZ')}.zip")
    _write(path, files)
    log.info(f"Diagnostic file written: {path}")
    failed = any(result["result"] == "failure" for result in report.values())
    if failed:
        log.warn("Diagnostic completed with one or more errors")
    else:
        log.info("Diagnostic completed")
    return 0


def _find(address: str, log: Logger) -> Instance | None:
    """Find the instance to ask; None after saying why there is none."""
    if address:
        try:
            return Instance(address, json.loads(_Client(address).get("/diag/tunnel")))
        except (OSError, HTTPException, ValueError) as error:
            raise DiagError(
                f"no connector answers at {address}: {error}", advice="Give the address that it was started with."
            ) from None
    found = []
    for known in known_addresses():
        try:
            found.append(Instance(known, json.loads(_Client(known, limit=1.0).get("/diag/tunnel"))))
        except (ConnectorError, OSError, HTTPException, ValueError):
            continue  # nobody there, or somebody else
    if len(found) == 1:
        log.info(f"Selected server {found[0].address}")
        return found[0]
    if not found:
        log.warn("No instances found")
        return None
    log.info("Found multiple instances running:")
    for each in found:
        tunnel, connector = each.state.get("tunnelID"), each.state.get("connectorID")
        log.info(f"Instance: tunnel-id={tunnel} connector-id={connector} metrics-address=http://{each.address}")
    log.info("To select one instance use the option --metrics")
    return None


class _Client:
    """Asks one instance."""

    def __init__(self, address: str, *, limit: float = REQUEST_SECONDS) -> None:
        place = urlsplit(address).netloc if "://" in address else address
        host, self._port = split_address(place, "--metrics", any_host=True)
        self._host = "127.0.0.1" if host in {"", "0.0.0.0", "localhost", "::"} else host
        self._limit = limit

    def get(self, path: str) -> bytes:
        """Give the body of a page. Errors: DiagError, OSError, HTTPException."""
        connection = HTTPConnection(self._host, self._port, timeout=self._limit)
        try:
            connection.request("GET", path, headers={"Accept": "application/json;version=1"})
            answer = connection.getresponse()
            body = answer.read(MAX_ANSWER)
        finally:
            connection.close()
        if answer.status != 200:
            raise DiagError(f"{path} answered status {answer.status}")
        return body

    def json(self, path: str) -> bytes:
        """Give a page of JSON, readable. Errors: as of `get`, ValueError."""
        return _pretty(json.loads(self.get(path)))


def _pretty(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _logs(client: _Client, container: str, pod: str) -> dict[str, bytes]:
    """Give the log: of a pod, of a container, of the service, or of the file that the instance writes."""
    since = (datetime.now(UTC) - LOG_SINCE).strftime("%Y-%m-%dT%H:%M:%SZ")
    if pod:
        command = ["kubectl", "logs", pod, "--since-time", since, "--tail", LOG_LINES]
        return _output([*command, *(["-c", container] if container else [])])
    if container:
        return _output(["docker", "logs", "--tail", LOG_LINES, "--since", since, container])
    settings = json.loads(client.get("/diag/configuration"))
    if settings.get("logfile"):
        return {"cloudflared_logs.txt": Path(settings["logfile"]).read_bytes()}
    if settings.get("log-directory"):
        newest = Path(settings["log-directory"]) / "cloudflared.log"
        return {path.name: path.read_bytes() for path in [*rotated(newest), newest]}
    if settings.get("uid") == "0" and _SERVICE_FILE.exists():
        return _output(["journalctl", "--since", "2 weeks ago", "-u", _SERVICE])
    if _SERVICE_LOG.exists():
        return {"cloudflared_logs.txt": _SERVICE_LOG.read_bytes()}
    raise DiagError(
        "Couldn't extract logs from the instance. If it is running in a containerized environment use the option "
        "--diag-container-id or --diag-pod-id. If there is no logging configuration use --no-diag-logs."
    )


def _output(command: list[str]) -> dict[str, bytes]:
    program = shutil.which(command[0])
    if program is None:
        raise DiagError(f"{command[0]} is not installed here")
    done = subprocess.run([program, *command[1:]], capture_output=True, timeout=TOTAL_SECONDS, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace")[:300]
        raise DiagError(f"{command[0]} ended with status {done.returncode}: {said}")
    return {"cloudflared_logs.txt": done.stdout + done.stderr}


def _trace_routes() -> dict[str, str]:
    """Trace the way to the edge's regions, in both IP versions, all at once."""
    wanted = {f"{host}-v{version}": ("traceroute" if version == 4 else "traceroute6", host)
              for host in _HOSTS for version in (4, 6)}  # fmt: skip
    running = {}
    for name, (program, host) in wanted.items():
        path = shutil.which(program)
        if path is None:
            raise DiagError(f"{program} is not installed here")
        running[name] = subprocess.Popen(
            [path, "-I", "-w", TRACE_SECONDS, "-m", TRACE_HOPS, host],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    found = {}
    for name, process in running.items():
        try:
            found[name], _ = process.communicate(timeout=TOTAL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            found[name], _ = process.communicate()
    return found


def _raw_routes(routes: dict[str, str]) -> bytes:
    return "".join(f"{name}\n{text}\n" for name, text in routes.items()).encode()


def _hops(routes: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    return {name: parse_route(text) for name, text in routes.items()}


def parse_route(text: str) -> list[dict[str, Any]]:
    """Give the hops of traceroute's output; `rtts` are microseconds, `*` stands for a hop that does not answer."""
    hops = []
    for line in text.splitlines():
        parts = [part for part in line.split() if part not in {"*", "ms"}]
        if not parts or not parts[0].isdecimal() or int(parts[0]) > 255:
            continue
        names, times = [], []
        for part in parts[1:]:
            try:
                times.append(int(float(part) * 1000))
            except ValueError:
                names.append(part)
        hop: dict[str, Any] = {"hop": int(parts[0]), "domain": " ".join(names) or "*"}
        if times:
            hop["rtts"] = times
        hops.append(hop)
    return hops


def _prechecks(region: str) -> bytes:
    from connector.app.prechecks import run_prechecks  # noqa: PLC0415  (loads dnspython)

    config = RunConfig(Token("", b"", UUID(int=0)))
    config.region = region
    return _pretty(asyncio.run(run_prechecks(config)).to_json())


def _write(path: Path, files: dict[str, bytes]) -> None:
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        path.chmod(0o600)  # logs and configuration are nobody else's business
    except OSError as error:
        raise DiagError(
            f"cannot write {path.absolute()}: {error.strerror or error}", advice="Run it in a directory that is yours."
        ) from None
