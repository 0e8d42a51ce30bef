"""`ingress validate` and `ingress rule URL`: what a configuration means, without running it.

Owns: these commands, their output and exit statuses, as cloudflared has them. In: words. Out: an exit status.
Never: connects anywhere. Notes that cloudflared does not print go to stderr, so that stdout is the same.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Final

from connector.app.command_table import Call
from connector.app.local_config import RUN_ONLY, LocalConfig, configured_flags, unknown_keys
from connector.errors import ConfigError
from connector.proxy.go_url import UrlError, parse_url
from connector.proxy.ingress import build_ingress
from connector.proxy.ingress_document import CommandLineDocument, read_json_document

_NO_RULES: Final = "The config file doesn't contain any ingress rules"


def _note(text: str) -> None:
    print(f"Note: {text}", file=sys.stderr)


def validate(call: Call) -> int:
    """Check the rules of a file or of `--json`."""
    flags, local = configured_flags(call.flags, skip=RUN_ONLY)
    text = flags.text("json") if flags.is_set("json") else None
    unused: tuple[str, ...] = local.file.unused if local is not None else ()
    if text is not None:
        print("Validating rules from cmdline flag --json", flush=True)
        try:
            document = read_json_document(json.loads(text), CommandLineDocument)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--json is not JSON: {error}") from None
    elif local is None or local.file.empty:
        if local is not None:
            _note(f"Configuration file {local.path} was empty")
        raise ConfigError(
            "No configuration file was found. Please create one, or use the --config flag to specify its filepath. "
            "You can use the help command to learn more about configuration files"
        )
    else:
        print(f"Validating rules from {local.path}", flush=True)
        document = local.file.document
    try:
        if not document.ingress:
            raise ConfigError(_NO_RULES)
        ingress = build_ingress(document, -1)
    except ConfigError as error:
        raise ConfigError(f"Validation failed: {error}", advice=error.advice) from None
    if flags.is_set("url"):
        raise ConfigError("You can't set the --url flag (or $TUNNEL_URL) when using multiple-origin ingress rules")
    if unused:
        print("Warning: unused keys detected in your config file. Here is a list of unused keys:")
        print("yaml: unmarshal errors:\n  " + "\n  ".join(unused), flush=True)
    else:
        print("OK", flush=True)
    for warning in ingress.warnings:
        _note(warning)
    if text is None and local is not None:
        _note_keys(local)
        for rule in ingress.rules:
            path = rule.settings.ca_pool
            if path and rule.service.tls and not os.access(path, os.R_OK):
                _note(f"Rule #{rule.index + 1}: originRequest.caPool: {path} cannot be read here; a run would fail")
    return 0


def _note_keys(local: LocalConfig) -> None:
    for key in unknown_keys(local):
        _note(f"the key {key} has no effect in a configuration file")


def rule_for(call: Call) -> int:
    """Print the rule that serves a URL."""
    _, local = configured_flags(call.flags, skip=RUN_ONLY)
    text = call.arguments[0] if call.arguments else ""
    if not text:
        raise ConfigError(f"{call.program} tunnel rule expects a single argument, the URL to test")
    try:
        url = parse_url(text)
    except UrlError:
        raise ConfigError(f"{text} is not a valid URL") from None
    if not url.hostname and not url.scheme:
        raise ConfigError(f"{text} doesn't have a hostname, consider adding a scheme")
    found = local is not None and not local.file.empty
    print(f"Using rules from {local.path if local is not None and found else ''}", flush=True)
    try:
        if local is None or not local.file.document.ingress:
            raise ConfigError(_NO_RULES)
        ingress = build_ingress(local.file.document, -1)
    except ConfigError as error:
        raise ConfigError(f"Validation failed: {error}", advice=error.advice) from None
    rule = ingress.match_path(ingress.candidates(url.hostname), url.path)
    print(f"Matched rule #{rule.index}")
    if rule.hostname:
        print(f"\thostname: {rule.hostname}")
    if rule.path:
        print(f"\tpath: {rule.path}")
    print(f"\tservice: {rule.service.text}", flush=True)
    return 0
