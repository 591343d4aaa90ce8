"""Preparation on many machines, through Apache Beam (extra `beam`): each input shard is one element of a pipeline.

    bd3 prepare --config=... --config.data.directory=gs://BUCKET/openwebtext --beam='RUNNER AND ITS OPTIONS'

Rows do not depend on the engine: they are the bytes that `bd3 prepare --workers=N` writes. The command is the driver:
it finds the files, trains a tokenizer if need be, waits for the pipeline, and writes the manifest; started again, it
runs only the shards that are missing. Every worker needs this package, and finds `data.source` and `data.directory`
under the same names: in a bucket, or under the same absolute paths on a file system that all share.
`docs/preparing_large_corpora.md` has the commands for Dataflow, Flink and Spark.
"""

import shlex

from bd3_jax.data.tasks import Report, Task
from bd3_jax.errors import UserError


def run_on_beam(tasks: list[Task], report: Report, options: str) -> None:
    """Runs every task in a pipeline; `options` are Beam's, as on a command line. Reports once, at the end.

    Raises:
      UserError: Beam is not installed, a path is relative, or the pipeline failed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("--beam needs Apache Beam; install the extra with `pip install 'bd3_jax[beam]'`") from None
    for path in (path for task in tasks for path in (task.result, *task.shard.files)):
        if not path.is_absolute():  # URLs are
            raise UserError(
                f"{path} means another file to every worker; allowed with --beam: absolute paths, and gs://"
            )
    try:
        with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
            # Reshuffled, so that shards are spread over the workers one by one.
            _ = pipeline | beam.Create(tasks, reshuffle=False) | beam.Reshuffle() | "Write shard" >> beam.Map(_run)
    except Exception as error:  # every runner has its own; what a task raised is in its text
        raise UserError(f"the Beam pipeline failed: {str(error).strip().splitlines()[-1]}") from error
    report(sum(task.shard.size for task in tasks), 0)


def _run(task: Task) -> None:
    task.run(lambda size, documents: None)
