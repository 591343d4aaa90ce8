"""What the tests of whole runs share."""

import json


def records(workdir):
    """(step, name) -> value of all metrics but those of speed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    values = [((line["step"], name), value) for line in lines for name, value in line.items() if name != "step"]
    assert len({key for key, _ in values}) == len(values), "a step stands there twice"
    return {key: value for key, value in values if not key[1].endswith(("per_second", "seconds"))}
