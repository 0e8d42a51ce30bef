"""`connector completion SHELL`: a script that completes commands, flags and their values.

Owns: the three scripts. In: the tables of commands and flags. Out: text. Never: runs the program at completion time,
which would cost its start-up at every press of the key.
"""

from __future__ import annotations

from collections.abc import Iterable

from connector.app.command_table import COMMANDS, SHORT, Call
from connector.app.flag_table import FLAGS, USED, Flag
from connector.errors import UsageError

SHELLS = ("bash", "zsh", "fish")

_FILES = frozenset({"FILE", "PATH", "DIR", "CAPTURE"})
"""Metavars after which file names are completed."""


def completion(call: Call) -> int:
    """Print the script for a shell."""
    if len(call.arguments) != 1 or call.arguments[0] not in SHELLS:
        raise UsageError(
            f"{call.program} completion needs the name of a shell: {', '.join(SHELLS)}",
            advice=f'For example: eval "$({call.program} completion bash)"',
        )
    print(script(call.arguments[0], call.program), end="")
    return 0


def script(shell: str, program: str) -> str:
    """Give the script for `shell`, for a program of that name."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](program)


class _Node:
    """What may follow one chain of words: commands, then flags."""

    def __init__(self, words: str) -> None:
        self.words = words
        self.children: dict[str, str] = {}
        self.flags: list[Flag] = []
        self.arguments: list[str] = []


def _nodes() -> dict[str, _Node]:
    """Give every chain of words, the empty one first."""
    shared = [flag for flag in FLAGS.values() if flag.effect == USED]
    nodes = {"": _Node("")}
    nodes[""].flags = shared
    for words, command in COMMANDS.items():
        parts = words.split()
        for depth in range(len(parts)):
            parent = nodes.setdefault(" ".join(parts[:depth]), _Node(" ".join(parts[:depth])))
            last = depth == len(parts) - 1
            if not (last and command.hidden):
                parent.children[parts[depth]] = command.summary if last else ""
        node = nodes.setdefault(words, _Node(words))
        node.flags = _merged(shared if command.tunnel_flags else [], command.flags)
        node.arguments = (
            command.arguments.split("|") if "|" in command.arguments and "[" not in command.arguments else []
        )
    for short, words in SHORT.items():
        nodes[short] = nodes[words]
        nodes[""].children[short] = COMMANDS[words].summary if words in COMMANDS else f"{words} ..."
    return nodes


def _merged(shared: Iterable[Flag], own: Iterable[Flag]) -> list[Flag]:
    return list({flag.name: flag for flag in (*shared, *own)}.values())


def _value_words(flag: Flag) -> str:
    """Say how a flag's value is completed: words, `files`, or nothing."""
    if flag.choices:
        return " ".join(flag.choices)
    return "files" if flag.metavar in _FILES else ""


def _all_flags(nodes: dict[str, _Node]) -> dict[str, Flag]:
    found: dict[str, Flag] = {}
    for node in nodes.values():
        for flag in node.flags:
            found.setdefault(flag.name, flag)
    return found


def _bash(program: str) -> str:
    nodes = _nodes()
    flags = _all_flags(nodes)
    takes = [flag for flag in flags.values() if flag.kind != "bool"]
    files = [f"--{flag.name}" for flag in takes if _value_words(flag) == "files"]
    lines = [
        f'# bash completion of {program}; to use it: eval "$({program} completion bash)"',
        f"_{program}() {{",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} path='' word index",
        "    COMPREPLY=()",
        "    for ((index = 1; index < COMP_CWORD; index++)); do",
        "        word=${COMP_WORDS[index]}",
        "        case $word in",
        f"            {'|'.join(f'--{flag.name}|-{flag.name}' for flag in takes)}) ((index++)) ;;",
        "            -*) ;;",
        '            *) path="${path:+$path }$word" ;;',
        "        esac",
        "    done",
        "    case $prev in",
        *(
            f"        --{flag.name}|-{flag.name}) "
            f"COMPREPLY=($(compgen -W '{_value_words(flag)}' -- \"$cur\")); return ;;"
            for flag in takes
            if flag.choices
        ),
        f'        {"|".join(files)}) COMPREPLY=($(compgen -f -- "$cur")); return ;;',
        "    esac",
        "    case $path in",
    ]
    for words, node in nodes.items():
        names = " ".join((*node.children, *node.arguments))
        options = " ".join(f"--{flag.name}" for flag in node.flags)
        lines.append(
            f"        '{words}') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '{options} --help' -- \"$cur\")); "
            f"else COMPREPLY=($(compgen -W '{names}' -- \"$cur\")); fi ;;"
        )
    lines += ["    esac", "}", f"complete -o default -F _{program} {program}"]
    return "\n".join(lines) + "\n"


def _zsh_text(text: str) -> str:
    """Quote text for the inside of single quotes and of a completion's square brackets."""
    return text.replace("'", "'\\''").replace("[", "(").replace("]", ")").replace(":", "\\:")


def _zsh(program: str) -> str:
    nodes = _nodes()
    lines = [f"#compdef {program}", f'# zsh completion of {program}; to use it: eval "$({program} completion zsh)"']
    lines += [f"_{program}() {{", "    local path='' word index", "    local -a takes"]
    takes = " ".join(f"--{flag.name} -{flag.name}" for flag in _all_flags(nodes).values() if flag.kind != "bool")
    lines += [
        f"    takes=({takes})",
        "    for ((index = 2; index < CURRENT; index++)); do",
        "        word=$words[index]",
        "        if (( $takes[(Ie)$word] )); then ((index++))",
        '        elif [[ $word != -* ]]; then path="${path:+$path }$word"; fi',
        "    done",
        "    case $path in",
    ]
    for words, node in nodes.items():
        specs = []
        for flag in node.flags:
            action = ""
            if flag.kind != "bool":
                values = _value_words(flag)
                action = f":{flag.metavar or 'value'}:" + ("_files" if values == "files" else f"({values})")
            star = "*" if flag.kind == "list" else ""
            specs.append(f"'{star}--{flag.name}[{_zsh_text(_first_sentence(flag.help))}]{action}'")
        names = [f"'{name}:{_zsh_text(summary)}'" for name, summary in node.children.items()]
        names += [f"'{name}'" for name in node.arguments]
        lines.append(f"        '{words}')")
        lines.append(f"            local -a names; names=({' '.join(names)})")
        lines.append(
            "            if [[ $words[CURRENT] != -* ]] && (( $#names )); then _describe command names; return; fi"
        )
        lines.append(f"            _arguments {' '.join(specs)} '--help[print help]' ;;")
    lines += ["    esac", "}", f"compdef _{program} {program}"]
    return "\n".join(lines) + "\n"


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish(program: str) -> str:
    nodes = _nodes()
    takes = " ".join(f"--{flag.name} -{flag.name}" for flag in _all_flags(nodes).values() if flag.kind != "bool")
    lines = [
        f"# fish completion of {program}; to use it: {program} completion fish | source",
        f"function __{program}_path",
        "    set -l path",
        "    set -l skip 0",
        "    for word in (commandline -opc)[2..-1]",
        "        if test $skip = 1; set skip 0; continue; end",
        f"        if contains -- $word {takes}; set skip 1; continue; end",
        "        string match -q -- '-*' $word; or set -a path $word",
        "    end",
        '    test "$path" = "$argv"',
        "end",
        f"complete -c {program} -f",
    ]
    for words, node in nodes.items():
        condition = f"-n {_fish_text(f'__{program}_path {words}')}"
        for name, summary in node.children.items():
            lines.append(f"complete -c {program} {condition} -a {name} -d {_fish_text(summary)}")
        for name in node.arguments:
            lines.append(f"complete -c {program} {condition} -a {name}")
        for flag in node.flags:
            values = _value_words(flag)
            value = "" if flag.kind == "bool" else " -r -F" if values == "files" else f" -x -a {_fish_text(values)}"
            text = _fish_text(_first_sentence(flag.help))
            lines.append(f"complete -c {program} {condition} -l {flag.name}{value} -d {text}")
    return "\n".join(lines) + "\n"
