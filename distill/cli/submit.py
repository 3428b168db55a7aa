"""`distill submit`: any verb, as a job on a running Ray cluster."""

from __future__ import annotations

import click


@click.command(
    "submit", short_help="Run a verb as a job on a running Ray cluster, and follow it.", context_settings={"ignore_unknown_options": True}
)
@click.option("--cluster", required=True, metavar="URL", help="Ray's job server: http://HOST:8265.")
@click.option("--patience-s", type=click.FloatRange(min=0), default=300, show_default=True, help="How long a silent cluster is waited for.")
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="VERB [ARGUMENTS]...")
@click.pass_context
def submit(context: click.Context, cluster: str, patience_s: float, arguments: tuple[str, ...]) -> None:
    """Run `distill VERB ARGUMENTS` on the head of a Ray cluster, with the workers of that cluster, show what it prints, and end as it ends.

    The cluster's machines have this package, the images and the run folder under the same paths. Started again while the job runs, it
    follows that job; Ctrl-C and SIGTERM stop the job, which writes a checkpoint first.
    """
    from distill.cluster.jobs import follow_job
    from distill.progress import console

    command = ["distill", *arguments, "ray.address=auto"]

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    end = follow_job(cluster, command, lambda text: click.echo(text, nl=False), say, patience_s)
    say(f"job {end.job_id}: {end.status.lower()}" + (f", exit code {end.exit_code}" if end.exit_code else ""))
    context.exit(end.exit_code)
