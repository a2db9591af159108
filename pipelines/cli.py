"""The command line: argv -> a validated configuration -> a verb. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
import yaml
from rich.console import Console

from heedful import UserError, __version__

app = typer.Typer(
    help="Fine-tune any pretrained transformer, and prove that the result is right.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
tokenizer_app = typer.Typer(no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer", help="Train a tokenizer on your own texts.")
attention_app = typer.Typer(no_args_is_help=True)
app.add_typer(attention_app, name="attention", help="Look at a model's attention.")
Config = Annotated[Path, typer.Argument(help="A YAML file, e.g. configs/ner.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings: train.learning_rate=3e-5 data.train=my.csv ...")]
Checkpoint = Annotated[str, typer.Argument(help="A run or its model folder, e.g. runs/ner/model")]


@app.callback(invoke_without_command=True)
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Options of every verb."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    # --debug is looked for in main(), where the errors arrive.


@app.command()
def finetune(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine, through torchrun.")] = 1,
    retries: Annotated[int, typer.Option("--retries", min=0, help="Times that a run which died is gone on with.")] = 0,
) -> None:
    """Fine-tune a model, evaluate it, and say where it is."""
    from pipelines.config import load

    settings = load(config, overrides or [])
    if retries:
        from pipelines.launch import supervise

        raise typer.Exit(supervise(sys.argv[1:], retries=retries, folder=Path(settings.output_dir)))
    if nproc > 1:
        from pipelines.launch import launch

        raise typer.Exit(launch(sys.argv[1:], nproc=nproc))
    from pipelines import finetune as verb
    from training.loop import Stopped

    try:
        verb.finetune(settings)
    except Stopped as stopped:
        if _is_main():
            typer.echo(f"{stopped}; resume=auto goes on", err=True)
        raise typer.Exit(143) from None


@app.command()
def reproduce(
    run: Annotated[Path, typer.Argument(help="A finished run, e.g. runs/ner")],
    out: Annotated[Path | None, typer.Option("--out", help="The new run's folder; else RUN.reproduced.")] = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes; as many as the run had.")] = 1,
) -> None:
    """Make a run again, and compare losses, metrics and weights; exit code 1 where a bit differs."""
    if nproc > 1:
        from pipelines.launch import launch

        raise typer.Exit(launch(sys.argv[1:], nproc=nproc))
    from pipelines import reproduce as verb
    from training.loop import Stopped

    try:
        raise typer.Exit(0 if verb.reproduce(run, out) else 1)
    except Stopped as stopped:
        if _is_main():
            typer.echo(f"{stopped}; it has to begin anew", err=True)
        raise typer.Exit(143) from None


@app.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """Say what a run will need: parameters, memory, steps and time, measured on two updates."""
    from pipelines import plan as verb
    from pipelines.config import load

    verb.plan(load(config, overrides or []))


@app.command()
def evaluate(checkpoint: Checkpoint, overrides: Overrides = None) -> None:
    """Score a model on its run's data, or on data.test=FILE; metrics as JSON on stdout."""
    from pipelines import evaluate as verb

    metrics = verb.evaluate(checkpoint, overrides or [])
    if _is_main():
        typer.echo(json.dumps(metrics, indent=2))


@app.command()
def predict(
    checkpoint: Checkpoint,
    given: Annotated[str, typer.Argument(metavar="INPUT", help="A file with the task's input columns, or a text.")],
    overrides: Overrides = None,
) -> None:
    """Print a model's answers, one JSON object a row."""
    from pipelines import predict as verb

    outputs = verb.predict(checkpoint, given, overrides or [])
    if _is_main():
        for output in outputs:
            typer.echo(json.dumps(output, ensure_ascii=False))


@app.command()
def config(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved configuration, every default written out."""
    from pipelines.config import load

    typer.echo(yaml.safe_dump(load(config, overrides or []).to_dict(), sort_keys=False), nl=False)


@app.command()
def assets(
    names: Annotated[list[str], typer.Argument(help="Assets or tasks; all fetches everything.")],
) -> None:
    """Fetch pinned models and data, and check every file of them."""
    from pipelines.assets import fetch_named

    fetch_named(names)


@app.command()
def push(
    checkpoint: Checkpoint,
    target: Annotated[str, typer.Argument(metavar="REPO", help="owner/name, or file:///folder.")],
    private: Annotated[bool, typer.Option("--private", help="For its owner alone.")] = False,
    tag: Annotated[str | None, typer.Option("--tag", help="A name for this version, such as v1.")] = None,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Publish whatever the terms of the data say.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Send without asking.")] = False,
) -> None:
    """Show what would go to a hub, and send it; the token is that of HF_TOKEN or `hf auth login`."""
    from pipelines import push as verb

    verb.push(checkpoint, target, private=private, tag=tag, accept_terms=accept_terms, yes=yes, ask=verb.on_terminal())


@app.command()
def pull(
    source: Annotated[str, typer.Argument(metavar="REPO", help="owner/name, or file:///folder.")],
    folder: Annotated[Path | None, typer.Argument(help="A new folder; else one of the model's name, here.")] = None,
    revision: Annotated[str, typer.Option("--revision", help="A branch, a tag or a commit.")] = "main",
) -> None:
    """Fetch a model from a hub, and compare every file with what the hub says it holds."""
    from pipelines import pull as verb

    typer.echo(verb.pull(source, folder, revision=revision))


@app.command("serve-hub")
def serve_hub(
    folder: Annotated[Path, typer.Argument(help="Where the hub keeps everything; made if it is not there.")],
    host: Annotated[str, typer.Option("--host", help="Other machines reach 0.0.0.0; that needs tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8765,
    new_token: Annotated[
        str | None, typer.Option("--new-token", metavar="USER", help="Print a new token for this user, and serve not.")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="The new token reads alone.")] = False,
) -> None:
    """Serve models and data sets from a folder, to every client that knows HF_ENDPOINT."""
    from pipelines import serve_hub as verb

    if new_token is None:
        verb.serve(folder, host=host, port=port)
    else:
        typer.echo(verb.new_token(folder, new_token, role="read" if read_only else "write"))


@tokenizer_app.command("train")
def train_tokenizer(
    out: Annotated[Path, typer.Argument(help="A new folder; model.tokenizer and AutoTokenizer open it.")],
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="Files with texts; data.delimiter=... data.encoding=... data.quotes=..."
        ),
    ],
    kind: Annotated[Literal["bpe", "wordpiece", "unigram"], typer.Option(help="bpe is byte-level.")] = "bpe",
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=1, help="Special tokens included.")] = 8000,
    columns: Annotated[str, typer.Option(help="Where the texts are: source,target. Else by their usual names.")] = "",
    special_tokens: Annotated[
        list[str] | None, typer.Option("--special-tokens", help="One more, e.g. '<sep>'.")
    ] = None,
    lowercase: Annotated[bool, typer.Option("--lowercase", help="Learn and encode in lower case.")] = False,
) -> None:
    """Learn a vocabulary from texts, and save a tokenizer."""
    from pipelines import tokenizer as verb

    names = [name.strip() for name in columns.split(",") if name.strip()]
    verb.train(
        str(out),
        given,
        kind=kind,
        vocab_size=vocab_size,
        columns=names,
        special_tokens=special_tokens or [],
        lowercase=lowercase,
    )


@attention_app.command("check")
def check_attention(
    model: Annotated[str, typer.Argument(help="A folder or a Hub id; its weights are not read.")],
    plan: Annotated[
        list[str] | None,
        typer.Argument(metavar="PLAN", help="attention=sliding_window attention.reach=64; none tries all."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", min=1, max=2**20, help="Tokens of a text, in place of the model's longest."),
    ] = None,
) -> None:
    """Show where other attention goes in, and what it saves; exit code 2 where it does not."""
    from pipelines import attention_check as verb

    verb.check(model, plan or [], length=length)


@attention_app.command("show")
def show_attention(
    checkpoint: Annotated[str, typer.Argument(help="A run, a model folder or a Hub id.")],
    text: Annotated[str, typer.Argument(help="Some words; an encoder-decoder answers them.")],
    out: Annotated[Path, typer.Option("--out", help="The page; a browser opens it without a network.")] = Path(
        "attention.html"
    ),
    figure: Annotated[
        Path | None, typer.Option("--figure", help="A drawing too: .svg, .png or .pdf; needs matplotlib.")
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", min=0, help="This one alone, from 0.")] = None,
    head: Annotated[int | None, typer.Option("--head", min=0, help="This one alone, from 0.")] = None,
) -> None:
    """Draw which token attends to which, in each layer and head."""
    from pipelines import attention_show as verb

    verb.show(checkpoint, text, out=out, figure=figure, layer=layer, head=head)


@attention_app.command("convert")
def convert_attention(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
) -> None:
    """Make a plain model with fewer key/value heads of one that was trained with grouped_query."""
    from pipelines import attention_convert as verb

    verb.convert(checkpoint, out)


def main() -> None:
    """Run the command line; a fault of the user's is one message and an exit code, never a traceback."""
    # Read when the libraries are imported: cuBLAS is deterministic only with a fixed workspace, and tokenizers'
    # threads warn about every fork after them.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # PEFT imports it in every run; on CPUs with native bf16 it then wants a package that fetches code from the Hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    code = 1  # as Python ends after an exception that nobody caught
    if "RANK" in os.environ:
        atexit.register(lambda: leave(code))  # before wandb and torch register theirs, and so called after them
    code = _run()
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """End one process of several at once, without taking its objects apart.

    torch 2.13 keeps gloo's threads until a process group is collected. If that happens as the interpreter ends, it
    waits for ever for a thread that waits for the interpreter, or a thread aborts the process (exit code -6), and
    torchrun then ends all others, however well the run went.

    As it does when one has stopped, and the main one still hands its figures to a tracker: they leave together.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 143:
            from torch import distributed

            distributed.barrier()
    finally:  # a pipe may be broken, a disk full
        os._exit(code)


def _run() -> int:
    try:
        app(standalone_mode=True)
    except SystemExit as ended:  # typer's way back
        if isinstance(ended.code, str):
            raise
        return ended.code or 0
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        if not _is_main():
            # Where the main process meets the same fault, torchrun ends this one meanwhile: one message in all.
            time.sleep(3)
        _show(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "--debug" in sys.argv or (code := _of_the_machine(error)) is None:
            raise
        return code
    return 0


def _of_the_machine(error: Exception) -> int | None:
    """Say what a full disk or a lost process is; the exit code then, and None for every other error."""
    if "No space left on device" in str(error):  # safetensors has its own error, which is no OSError
        _show(UserError(str(error), fix="make room on the disk; a training goes on with resume=auto"))
        return UserError.exit_code
    return _left_alone(error) if "RANK" in os.environ else None


def _left_alone(error: Exception) -> int | None:
    from torch.distributed import DistNetworkError

    from pipelines.launch import LOST, RUN_ID
    from sources.texts import first_line

    if not (isinstance(error, DistNetworkError) or "gloo/transport" in str(error)):
        return None
    if os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID:
        return LOST
    time.sleep(3)  # in which torchrun ends this one, if the other was its own, and says which that was
    _show(UserError(f"another process was lost: {first_line(error)}", fix="resume=auto goes on"))
    return 1


def _show(error: UserError) -> None:
    from rich.markup import escape

    from hub.redaction import hide

    text = escape(hide(str(error)))
    Console(stderr=True, soft_wrap=True, emoji=False).print(f"[bold red]error[/]\n{text}", highlight=False)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main()
