"""`connector run`: from flags to a run of the process.

Owns: the order of the start: log, token, checks, warnings. In: a Call. Out: an exit status.
Never: opens a socket; prints a secret.
"""

from __future__ import annotations

from connector.app.command_table import Call
from connector.app.config import read_token, run_config
from connector.app.first_objects import loading
from connector.app.flag_table import NO_EFFECT
from connector.app.local_config import configured_flags, say_what_was_read
from connector.app.logs import Logger, stderr_logger


def run(call: Call) -> int:
    """Run a tunnel until it is told to stop."""
    flags, local = configured_flags(call.flags)
    call = call._replace(flags=flags)
    flags.check()
    log = start_log(call)
    token_text = read_token(flags)
    if token_text:
        log.output.redactor.add(token_text)
    config = run_config(flags, call.arguments, token_text, local)
    log.output.redactor.add_bytes(config.token.secret)
    say_what_was_read(flags, local, log)
    if flags.text("hostname"):
        log.warn("The flag --hostname is of classic tunnels and is ignored: host names belong to the tunnel's rules")

    with loading():
        from connector.app.process import run_tunnel  # noqa: PLC0415  (everything that a run needs)

    return run_tunnel(config, log)


def start_log(call: Call) -> Logger:
    """Make the process's log and say which flags do not what they say."""
    flags = call.flags
    log = stderr_logger(
        level=flags.text("loglevel"),
        json_lines=flags.text("output") == "json",
        no_color=bool(call.environ.get("NO_COLOR")),
        logfile=flags.text("logfile"),
        log_directory=flags.text("log-directory"),
    )
    for name, text, instead in flags.unknown():
        what = "log level" if "level" in name else f"--{name}"
        log.error(f'Failed to parse {what} "{text}", using "{instead}" instead')
    if call.exposed:
        _warn_exposed(log, call.exposed)
    ignored = flags.given(NO_EFFECT)
    if ignored:
        log.debug("Flags without effect", flags=ignored)
    return log


def _warn_exposed(log: Logger, exposed: str) -> None:
    if exposed == "wiped":
        log.warn(
            "The token was given on the command line, where other users could see it for a moment; "
            "it is wiped from the process list now. Prefer --token-file FILE."
        )
    else:
        log.warn(
            "The token was given on the command line and stays visible in the process list, because the package "
            "setproctitle is not installed. Use --token-file FILE."
        )
