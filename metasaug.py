"""The command line: `metasaug COMMAND …`. Each command is imported only when it is called."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    function: str  # "module:name"; its docstring and annotations are the command's help and flags
    summary: str
    then: str | None = None  # "module:name", called with what the function returned


COMMANDS = {
    "demo": Command("app:demo", "the Gradio app, on the bundled models"),
    "list": Command("zoo.command_line:list_table", "the models: data, weights, errors"),
    "info": Command("zoo.command_line:info", "the card of a model"),
    "predict": Command("zoo.command_line:predict", "classify pictures"),
    "evaluate": Command("training.report.evaluate:evaluate",
                        "measure a model on labelled pictures, per group and class"),
    "data check": Command("training.data.check:check", "look at a data set before training: faults, cuts, the tail"),
    "train": Command("training.command_line:train", "train on a benchmark; ends in a model folder",
                     then="export.command_line:finish"),
    "import": Command("export.authors_files:import_file", "a model folder from a checkpoint that its authors released"),
    "export": Command("export.command_line:export", "ONNX beside the weights of a model folder"),
    "publish": Command("export.publish:publish", "a model folder to the Hugging Face Hub"),
    "release": Command("export.release:release", "train, measure, export and publish every cell that is not out yet"),
}

# What each missing library belongs to.
EXTRAS = {"torch": "train", "torchvision": "train", "onnx": "train", "onnxscript": "train", "gradio": "demo",
          "tensorboard": "tensorboard"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 2 an error told in one message, 130, 143 and 129 stopped."""
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
    try:
        result = tyro.cli(_found(command.function), prog=f"metasaug {name}", args=arguments)
    except Exception as error:
        if command.then is not None and (left := getattr(error, "model", None)) is not None:
            _found(command.then)(left)  # a run that was stopped, with a model of before
        raise
    if command.then is not None:
        _found(command.then)(result)
    sys.stdout.flush()
    return result if isinstance(result, int) else 0


def _found(where: str):
    module, name = where.split(":")
    return getattr(importlib.import_module(module), name)


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: metasaug COMMAND [flags]      metasaug COMMAND --help", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
