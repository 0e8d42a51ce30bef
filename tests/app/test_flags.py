from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from connector.app.command_table import COMMANDS
from connector.app.flag_table import ALIASES, FLAGS, GROUPS, NO_EFFECT, USED
from connector.app.flags import Flags, parse_level
from connector.app.usage import usage
from connector.errors import UsageError


def flags(*argv: str, env: dict[str, str] | None = None) -> Flags:
    return Flags([parse_level(argv)], env or {})


@pytest.mark.parametrize("argv", [("-token", "T"), ("--token", "T"), ("-token=T",), ("--token=T",)])
def test_one_dash_or_two_space_or_equals(argv: tuple[str, ...]) -> None:
    assert flags(*argv).text("token") == "T"


@pytest.mark.parametrize("text", ["1", "t", "T", "true", "TRUE", "True"])
def test_booleans_that_are_true(text: str) -> None:
    assert flags(f"--no-autoupdate={text}").value("no-autoupdate") is True


@pytest.mark.parametrize("text", ["0", "f", "F", "false", "FALSE", "False"])
def test_booleans_that_are_false(text: str) -> None:
    assert flags(f"--no-autoupdate={text}").value("no-autoupdate") is False


def test_a_boolean_takes_no_word() -> None:
    level = parse_level(["--no-autoupdate", "run", "--url", "x"])
    assert level.given == {"no-autoupdate": ["true"]}
    assert level.rest == ["run", "--url", "x"]


def test_two_dashes_end_the_flags() -> None:
    assert parse_level(["--url", "u", "--", "--token", "x"]).rest == ["--token", "x"]


def test_a_value_may_look_like_a_flag() -> None:
    assert flags("--url", "--weird").text("url") == "--weird"


def test_lists_repeat_and_scalars_take_the_last() -> None:
    given = flags("--edge", "a:1", "--edge=b:2", "--url", "x", "--url", "y")
    assert given.texts("edge") == ["a:1", "b:2"]
    assert given.text("url") == "y"


def test_precedence_is_run_then_tunnel_then_global_then_environment_then_default() -> None:
    env = {"TUNNEL_LOGLEVEL": "warn", "TUNNEL_RETRIES": "9", "TUNNEL_EDGE": "e:1, f:2"}
    given = Flags(
        [
            parse_level(["--loglevel", "debug", "--url", "global"]),
            parse_level(["--loglevel", "info", "--url", "tunnel"]),
            parse_level(["--loglevel", "error"]),
        ],
        env,
    )
    assert given.text("loglevel") == "error"
    assert given.text("url") == "tunnel"
    assert given.number("retries") == 9
    assert given.texts("edge") == ["e:1", "f:2"]
    assert given.number("grace-period") == 30.0
    assert given.source("retries") == "TUNNEL_RETRIES"
    assert given.source("grace-period") == ""


def test_an_empty_variable_counts_for_strings_only() -> None:
    given = flags(env={"TUNNEL_URL": "", "NO_AUTOUPDATE": "", "TUNNEL_RETRIES": ""})
    assert given.is_set("url")
    assert given.text("url") == ""
    assert not given.is_set("no-autoupdate")
    assert given.number("retries") == 5
    given.check()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--tokn", "x"], ["-tokn", "--token?"]),
        (["--has-connections=3"], ["-has-connections", "--ha-connections?"]),
        (["--qqqqqqq"], ["-qqqqqqq"]),
        (["--grace-period", "30"], ['"30"', "-grace-period: parse error", "30s"]),
        (["--retries=many"], ["many", "-retries: parse error", "whole number"]),
        (["--retries=1_0"], ["1_0"]),
        (["--retries=99999999999999999999"], ["-retries: value out of range"]),
        (["--retries=" + "9" * 5000], ["-retries: value out of range"]),
        (["--max-active-flows=-1"], ["-1", "-max-active-flows: parse error"]),
        (["--no-autoupdate=maybe"], ["invalid boolean value", "maybe", "-no-autoupdate: parse error", "true or false"]),
        (["--edge-ip-version", "5"], ["5", "-edge-ip-version", "auto, 4, 6"]),
        (["--token"], ["Incorrect Usage: flag needs an argument: -token"]),
        (["--p", "http2", "--protocol", "http2"], ["two forms", "p", "protocol"]),
        (["---x"], ["bad flag syntax", "---x"]),
        (["-=x"], ["bad flag syntax"]),
    ],
)
def test_errors_name_flag_value_and_what_is_allowed(argv: list[str], named: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_level(argv)
    for part in named:
        assert part in f"{caught.value} {caught.value.advice}"


def test_an_unknown_level_or_format_is_the_default_and_is_named() -> None:
    given = flags("--loglevel", "loud", "--output", "JSON", env={"TUNNEL_TRANSPORT_LOGLEVEL": "shy"})
    assert (given.text("loglevel"), given.text("output"), given.text("transport-loglevel")) == ("info", "json", "info")
    assert given.unknown() == [("loglevel", "loud", "info"), ("transport-loglevel", "shy", "info")]
    assert flags("--loglevel", "INFO").unknown() == []


def test_errors_of_the_environment_name_the_variable() -> None:
    with pytest.raises(UsageError, match="TUNNEL_GRACE_PERIOD"):
        flags(env={"TUNNEL_GRACE_PERIOD": "soon"}).check()
    with pytest.raises(UsageError, match="NO_AUTOUPDATE"):
        flags(env={"NO_AUTOUPDATE": "perhaps"}).check()


def test_secrets_are_not_shown() -> None:
    token = "eyJhIjoiMDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWYifQ=="
    assert flags("--token", token, "--url", "x").settings() == {"token": "*****", "url": "x"}
    shown = flags("--edge", "a:1", "--edge", "b:2", "-p", "quic", "--grace-period", "90s", "--socks5").settings()
    assert shown == {"edge": "[a:1 b:2]", "grace-period": "1m30s", "p": "quic", "protocol": "quic", "socks5": "true"}
    assert flags("--loglevel", token).unknown() == [("loglevel", "(hidden: looks like a token)", "info")]
    for argv in ([f"--no-autoupdate={token}"], ["--edge-ip-version", token], [f"-{token}"], [f"--{token}", "x"]):
        with pytest.raises(UsageError) as caught:
            parse_level(argv)
        assert token.rstrip("=") not in f"{caught.value} {caught.value.advice}"


def test_levels_are_read_without_case() -> None:
    assert flags("--loglevel", "WARNING").text("loglevel") == "warn"


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first text of a process takes a second on a busy machine
@given(st.lists(st.text(max_size=12), max_size=6))
def test_any_command_line_parses_or_is_a_usage_error(argv: list[str]) -> None:
    try:
        level = parse_level(argv, version_flag=True)
    except UsageError:
        return
    assert len(level.rest) <= len(argv)


def test_the_table_is_sound() -> None:
    assert len(ALIASES) == len({*ALIASES} - {*FLAGS})
    for flag in FLAGS.values():
        assert flag.kind in {"bool", "int", "uint", "string", "list", "duration", "optional"}
        assert (flag.effect == NO_EFFECT) == (flag.group not in GROUPS) == (flag.help == "")
        assert flag.effect == NO_EFFECT or bool(flag.metavar) == (flag.kind != "bool")
    variables = [variable for flag in FLAGS.values() for variable in flag.env]
    assert len(variables) == len(set(variables))
    flags().check()


@pytest.mark.parametrize("level", ["", "flags", *COMMANDS])
def test_help_fits_80_columns(level: str) -> None:
    text = usage(level)
    assert text.endswith("\n")
    assert max(len(line) for line in text.splitlines()) <= 80


def test_help_shows_every_flag_somewhere() -> None:
    for flag in FLAGS.values():
        assert f"--{flag.name}" in usage("tunnel run" if flag.effect == USED else "flags")


def test_flags_are_sorted_by_what_they_do() -> None:
    given = flags("--transport-loglevel", "warn", "--no-autoupdate", "--url", "x")
    assert sorted(given.given(NO_EFFECT)) == ["no-autoupdate", "transport-loglevel"]
    assert given.given(USED) == ["url"]
