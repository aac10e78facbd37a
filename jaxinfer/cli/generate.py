"""`jaxinfer generate`: one prompt to stdout, or files of prompts to files of answers.

Stability: experimental.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxinfer.batch.params import SamplingParams
from jaxinfer.cli import cluster, options
from jaxinfer.cli.sampling import with_sampling
from jaxinfer.errors import InputError

Prompt = Annotated[str | None, typer.Option(help="Continue this text on stdout; - reads it from stdin.")]
Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Where the answers go, a JSON line for each row, in the rows' order."),
]
DRAFTER_HELP = """Propose several tokens a forward: plain, draft[:gamma=4], copyspec, token-recycling, ...: see
`jaxinfer methods`. auto[:drafter=copyspec] drafts as far as that pays on this machine, by each row's acceptance; a job
measures its forwards once and keeps the times. (The width of its forwards follows the rows at work, and rounding the
width: where two tokens are all but equal, an answer may differ from that in another batch.)"""
Drafter = Annotated[str | None, typer.Option(help=" ".join(DRAFTER_HELP.split()))]
BatchSize = Annotated[str, typer.Option(help="Rows in work at a time: a number, or auto, which is what memory allows.")]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Seed of the run: a row's draws follow from it and the row's id.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check every row and stop before any weight is loaded.")]
ForceNew = Annotated[bool, typer.Option("--force-new", help="Put a job of this output aside and begin a new one.")]
RayWorkers = Annotated[
    int | None,
    typer.Option("--ray-workers", min=1, help="Work on the job with so many workers on a Ray cluster (extra: ray)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="With --prompt: the answer as one JSON line.")]


@cluster.clustered
@with_sampling
def generate(
    prompt: Prompt = None,
    input: options.InputFiles = None,
    output: Output = None,
    model: options.Model = "tinycode",
    adapter: options.Adapter = None,
    draft_model: options.DraftModel = None,
    drafter: Drafter = None,
    weights: options.Weights = "auto",
    cache: options.CacheKind = "auto",
    batch_size: BatchSize = "auto",
    max_length: options.MaxLength = None,
    mesh: options.Mesh = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    force_new: ForceNew = False,
    ray_workers: RayWorkers = None,
    as_json: AsJson = False,
    sampling: SamplingParams = SamplingParams(),  # noqa: B008 - immutable
    watch: Any = None,
) -> None:
    """Continue prompts with a language model.

    \b
    One prompt, its answer on stdout:
      jaxinfer generate --prompt "def quicksort(xs):" --max-tokens 64
    A batch job. Rows are {"id": ..., "prompt": ...} with any parameter below, or OpenAI
    batch rows. The same command again goes on where a killed one stopped; several
    at once, on one machine or many, share the work:
      jaxinfer generate --model DIR --input in.jsonl --output out.jsonl --max-tokens 256
    """
    if (prompt is None) == (not input):
        raise InputError("generate: accepted: either --prompt or --input")
    draft_model = options.draft_for(model, draft_model, drafter)
    drafter = drafter or options.default_drafter(draft_model)
    options.DRAFTERS.parse(drafter, step=None, target=None)  # told before anything is loaded
    if prompt is not None:
        from jaxinfer.cli import one

        if watch is not None:
            raise InputError("--coordinator: got it with --prompt; accepted: with a job, --input and --output")
        if output is not None or dry_run or force_new or ray_workers is not None:
            raise InputError(
                "generate: got a job's option with --prompt; accepted: --output, --dry-run, --force-new and "
                "--ray-workers with --input"
            )
        text = sys.stdin.read() if prompt == "-" else prompt
        lm = one.prepare(model, draft_model, options.format_of(weights, cache, adapter), max_length, mesh)
        room = one.room(lm, [text], sampling.max_tokens)
        one.answer(
            lm, text, sampling, seed=seed or 0, as_json=as_json,
            drafter=options.drafter_of(drafter, lm, batch=sampling.n, capacity=room),
        )  # fmt: skip
        return
    from jaxinfer.cli import job

    asked = job.Asked(
        inputs=input or [], output=output, model=model, draft_model=draft_model, drafter=drafter, weights=weights,
        cache=cache, batch_size=batch_size, max_length=max_length, seed=seed, force_new=force_new, sampling=sampling,
        adapter=adapter, mesh=mesh,
    )  # fmt: skip
    if ray_workers is not None and watch is not None:
        raise InputError("--ray-workers: got it with --coordinator; accepted: one of them, since Ray starts its own")
    if ray_workers is not None and not dry_run:
        raise typer.Exit(job.run_on_ray(asked, ray_workers))
    raise typer.Exit(job.dry_run(asked) if dry_run else job.run(asked, watch))
