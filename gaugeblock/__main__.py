"""The one door: `gaugeblock COMMAND …`, also `python -m gaugeblock COMMAND …`.

Exit codes: 0 done, 1 the answer is no, 2 no verdict (bad usage or input), 3 internal error.
"""

import importlib
import sys
import traceback

import typer

from gaugeblock import __version__

_ROOMS = ("reference", "kernels", "gpt", "benchmarks")


def _version(asked: bool):
    if asked:
        print(f"gaugeblock {__version__}")
        raise typer.Exit


def door():
    """The app with every room's commands."""
    app = typer.Typer(
        name="gaugeblock",
        help="Check, measure, train and run GPT kernels and models.",
        epilog="Exit codes: 0 done, 1 the answer is no, 2 bad usage or input, 3 internal error.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def gaugeblock(
        version: bool = typer.Option(
            False, "--version", callback=_version, is_eager=True, help="Print the version."
        ),
    ):
        pass

    for room in _ROOMS:
        app.add_typer(importlib.import_module(f"gaugeblock.{room}.cli").app)
    return app


def main(arguments=None):
    """Run a command line; the process exits with its code."""
    try:
        sys.exit(door()(arguments, prog_name="gaugeblock") or 0)
    except ModuleNotFoundError as error:
        room = "gpt" if error.name in ("matplotlib", "tiktoken", "tokenizers") else "kernels"
        _fail(f"this command needs {error.name}: pip install 'gaugeblock[{room}]'")
    except (ValueError, OSError) as error:
        _fail(error)
    except Exception:
        traceback.print_exc()
        sys.exit(3)


def _fail(message):
    print(f"gaugeblock: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
