"""What lm-eval measures of an export on a local task: run as `play_lm_eval.py JOB ANSWER`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": job["folder"], "dtype": "float32", "device": "cpu"},
        tasks=[job["task"]],
        task_manager=TaskManager(include_path=job["tasks"], include_defaults=False),
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
    )
    answer = {
        "version": version("lm-eval"),
        "results": found["results"][job["task"]],
        "samples": [
            [float(reply[0][0]) for reply in sample["resps"]]
            for sample in found["samples"][job["task"]]
        ],
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))
