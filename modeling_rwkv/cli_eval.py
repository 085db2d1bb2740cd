"""The command that evaluates: it runs lm-evaluation-harness by way of `eval/`, whose packages are an extra."""

from pathlib import Path
from typing import Annotated

import typer

from modeling_rwkv.cli_base import CommandError, Debug, count, number, optional, write

app = typer.Typer()


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder or Hub id of an RWKV-4. [default: the model in the box]"),
    ] = None,
    tasks: Annotated[
        str, typer.Option(metavar="A,B,...", help="Tasks of lm-evaluation-harness; rwkv_paper is the paper's suite.")
    ] = "rwkv_paper",
    limit: Annotated[int | None, count("--limit", "Questions of each task. [default: all]")] = None,
    num_fewshot: Annotated[
        int | None,
        number(
            "--num-fewshot",
            "Examples before each question. [default: as the task says, mostly 0]",
            lambda x: x >= 0,
            "a whole number from 0 up",
            int,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of JSONL files, instead of the Hugging Face Hub.")
    ] = None,
    peft: Annotated[str | None, typer.Option(metavar="ADAPTER", help="Folder or Hub id of a PEFT adapter.")] = None,
    state: Annotated[str | None, typer.Option(metavar="FILE", help="State to begin with, of state tuning.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A bundled sample of every task, offline.")] = False,
    output: Annotated[str, typer.Option(metavar="DIR", help="Where the results go, as JSON.")] = "results",
    batch_size: Annotated[int, count("--batch-size", "Texts read together.")] = 16,
    prefix_token: Annotated[
        str, typer.Option(help="What stands before every text: nothing, end-of-text or newline.")
    ] = "nothing",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is cuda if there is one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16 or float64; auto as in rwkv generate.")
    ] = "auto",
    debug: Debug = False,
) -> None:
    """Ask a model what benchmarks ask, without training on them.

    Prints a table, and writes it with all that it was measured on and with. The same command again goes on where an
    interrupted one was.

    \b
    Examples:
      rwkv eval --quick
      rwkv eval RWKV/rwkv-4-169m-pile --tasks lambada_openai,piqa
      rwkv eval my-model/ --data zero_shot/ --limit 100
    """
    if quick and data is not None:
        raise CommandError(f"--quick brings its own data, and --data is {data}: give one of them")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise CommandError(f"--tasks is {tasks!r}: name at least one, such as rwkv_paper")
    library = optional("rwkv_eval.zero_shot", "eval")
    Path(output).mkdir(parents=True, exist_ok=True)
    try:
        results = library.evaluate(
            model,
            names,
            data=library.SAMPLE if quick else data,
            limit=limit,
            num_fewshot=num_fewshot,
            peft=peft,
            state=state,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            prefix_token=prefix_token,
            cache=output,
            debug=debug,
        )
    except library.REFUSALS as error:
        raise CommandError(str(error)) from error
    except KeyboardInterrupt:
        typer.echo("\nStopped; the same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    if results is None:  # another process has them all
        return
    write(library.table(results))
    for task in results["rwkv"]["skipped_tasks"]:
        typer.echo(f"{task} was skipped: {data} has no {task}.jsonl", err=True)
    typer.echo(f"wrote {library.save(results, output)}", err=True)
