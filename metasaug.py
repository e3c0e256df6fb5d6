"""The command line: `metasaug COMMAND …`. Each command is imported only when it is called."""

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple


class Command(NamedTuple):
    group: str
    function: str  # "module:name"; its docstring and annotations are the command's help and flags
    summary: str
    then: str | None = None  # "module:name", called with the function's result
    help: str | None = None  # "module:name", called with the arguments; by default tyro's help


USE, TRAIN, SHARE = "Use a model", "Train a model", "Share models"
COMMANDS = {
    "demo": Command(USE, "app:demo", "try models in the browser, on examples or your own pictures"),
    "list": Command(USE, "zoo.command_line:list_table", "list the models: data, weights, test error"),
    "info": Command(USE, "zoo.command_line:info", "show a model's card"),
    "predict": Command(USE, "zoo.predict_command:predict", "classify pictures, folders and zip files"),
    "convert": Command(USE, "zoo.exchange:convert", "convert predictions for Timelapse or Camtrap DP"),
    "evaluate": Command(USE, "training.report.evaluate:evaluate",
                        "measure a model on labelled pictures, per group and class"),
    "completion": Command(USE, "metasaug:completion", "print a completion script for bash or zsh"),
    "data check": Command(TRAIN, "training.data.check:check",
                          "check your data before training: bad files, class counts, splits, cost",
                          help="training.help:help_of_check"),
    "train": Command(TRAIN, "training.command_line:train", "train on your own pictures or on a benchmark",
                     then="export.command_line:finish", help="training.help:help_of"),
    "import": Command(SHARE, "export.authors_files:import_file", "make a model folder from the authors' checkpoint"),
    "export": Command(SHARE, "export.command_line:export", "write ONNX beside the weights of a model folder"),
    "calibrate": Command(SHARE, "export.calibrate:calibrate",
                         "calibrate a model, and add prediction sets"),
    "publish": Command(SHARE, "export.publish:publish", "upload a model folder to the Hugging Face Hub"),
    "release": Command(SHARE, "export.release:release", "train, measure, export and publish the zoo's missing models"),
}

# The extra that installs each optional library.
EXTRAS = {"torch": "train", "torchvision": "train", "onnx": "train", "onnxscript": "train", "gradio": "demo",
          "tensorboard": "tensorboard", "pyarrow": "parquet", "ray": "ray"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0: done; 2: an error, explained in one message; 130, 143 and 129: stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name = " ".join(arguments[:words]) or "--help"
    if name in ("--help", "-h"):
        print(overview())
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"metasaug {version('metasaug')}")
        return 0
    if name not in COMMANDS:
        longer = [command for command in COMMANDS if command.startswith(f"{name} ")]
        hint = f" Did you mean {' or '.join(longer)}?" if longer else ""
        print(f"Unknown command {name!r}.{hint}\n\n{overview()}", file=sys.stderr)
        return 2

    from zoo.errors import ZooError

    try:
        return _call(name, arguments[words:])
    except ZooError as error:
        print(f"metasaug {name}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `metasaug list | head`
        sys.stderr.close()
        return 0
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        print(f"metasaug {name} needs {error.name}, which is not installed: pip install 'metasaug[{extra}]'",
              file=sys.stderr)
        return 2


def _call(name: str, arguments: list[str]) -> int:
    import tyro

    command = COMMANDS[name]
    if command.help is not None and {"-h", "--help"} & set(arguments):
        print(_found(command.help)(arguments))
        return 0
    try:
        result = tyro.cli(_found(command.function), prog=f"metasaug {name}", args=arguments)
    except Exception as error:
        if command.then is not None and (left := getattr(error, "model", None)) is not None:
            _found(command.then)(left)  # the run was stopped after it had saved a model
        raise
    if command.then is not None:
        _found(command.then)(result)
    sys.stdout.flush()
    return result if isinstance(result, int) else 0


def _found(where: str):
    module, name = where.split(":")
    return getattr(importlib.import_module(module), name)


def overview() -> str:
    lines = ["usage: metasaug COMMAND [flags]      metasaug COMMAND --help"]
    for group in (USE, TRAIN, SHARE):
        lines += ["", f"{group}:", *(f"  {name:<10}  {command.summary}" for name, command in COMMANDS.items()
                                     if command.group == group)]
    return "\n".join(lines)


def completion(shell: Literal["bash", "zsh"], /) -> None:
    """Print a script that lets your shell complete commands, data sets, flags and model names.

    Making it takes some seconds, so save it to a file:
    metasaug completion bash > ~/.local/share/bash-completion/completions/metasaug
    metasaug completion zsh > ~/.metasaug.zsh; in ~/.zshrc, after compinit: source ~/.metasaug.zsh
    """
    data_sets = " ".join(job.recipe.dataset for job in _found("training.command_line:JOBS"))
    models = " ".join(entry.name for entry in _found("zoo.registry:list_models")())
    cases = ['data) words="check" ;;', *(f'{name}) words="{data_sets}" ;;' for name in ("train", '"data check"'))]
    for name in COMMANDS:
        for words in [f"{name} {one}" for one in data_sets.split()] if name in ("train", "data check") else [name]:
            flags = " ".join(_flags(words)) + (f" {models}" if name in ("predict", "evaluate", "info") else "")
            cases.append(f'"{words}"*) words="{flags}" ;;')
    if shell == "zsh":
        print("autoload -Uz bashcompinit && bashcompinit")
    print(COMPLETION.format(commands=" ".join(sorted({name.split()[0] for name in COMMANDS})),
                            cases="\n    ".join(cases)))


COMPLETION = """_metasaug() {{
  local words="{commands}" line="${{COMP_WORDS[*]:1:$((COMP_CWORD - 1))}}"
  case "$line" in
    {cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _metasaug metasaug"""


def _flags(words: str) -> list[str]:
    """The flags in a command's help."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*words.split(), "--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", said.getvalue())))


if __name__ == "__main__":
    sys.exit(main())
