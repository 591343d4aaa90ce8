"""Preparation on many machines, through Apache Beam (extra `beam`): each input shard is one element of a pipeline.

    pip install 'bd3_jax[beam]'
    bd3 prepare --config=... --config.data.directory=/shared/openwebtext --beam='RUNNER AND ITS OPTIONS'

Rows do not depend on the engine: they are the bytes that `bd3 prepare --workers=N` writes. The command is the driver:
it finds the files, trains a tokenizer if need be, waits for the pipeline, and writes the manifest; started again, it
runs only the shards that are missing. Every worker needs this package, and finds `data.source` and `data.directory`
under the same absolute paths, as on a shared file system. RUNNER AND ITS OPTIONS are for example

    on this machine    --runner=DirectRunner --direct_num_workers=8 --direct_running_mode=multi_processing
    Flink              --runner=FlinkRunner --flink_master=HOST:8081 --parallelism=64 --environment_type=DOCKER
                       --environment_config=IMAGE
    Spark              --runner=SparkRunner --spark_master_url=spark://HOST:7077 --environment_type=DOCKER
                       --environment_config=IMAGE

IMAGE is Beam's own for this Python (`apache/beam_python3.11_sdk:2.77.0`) with `pip install 'bd3_jax[beam]'` done in it.
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
        if not path.is_absolute():
            raise UserError(f"{path} means another file to every worker; allowed with --beam: absolute paths")
    try:
        with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
            # Reshuffled, so that shards are spread over the workers one by one.
            _ = pipeline | beam.Create(tasks, reshuffle=False) | beam.Reshuffle() | "Write shard" >> beam.Map(_run)
    except Exception as error:  # every runner has its own; what a task raised is in its text
        raise UserError(f"the Beam pipeline failed: {str(error).strip().splitlines()[-1]}") from error
    report(sum(task.shard.size for task in tasks), 0)


def _run(task: Task) -> None:
    task.run(lambda size, documents: None)
