"""`bench --training`: every check, then what training costs."""

from __future__ import annotations

from pathlib import Path

from megatron_xielu.bench import training
from megatron_xielu.doctor import machine
from megatron_xielu.doctor.checks import CHECKS
from megatron_xielu.doctor.run import check_all, show_machine
from megatron_xielu.errors import UserError


def full(*, tiny: bool, csv: Path | None, markdown: Path | None) -> int:
    """Check and measure this machine; 1 if a check failed or a variant could not train.

    Args:
        tiny: a small model, also without a GPU, to try the command.
        csv: a file to append the rows to.
        markdown: a file to write the table to.

    Raises:
        UserError: there is no GPU, or a file cannot be written.
    """
    found = machine.probe()
    if not found.gpus and not tiny:
        raise UserError(
            f"bench --training measures a GPU, and there is none: {machine.why_no_gpu()}. "
            "--tiny runs all of it on a small model without one; tools/bench_training.py times "
            "training on a CPU"
        )
    training.check_writable(csv, markdown)
    show_machine(found)
    passed = check_all(CHECKS, found)
    measured = training.measure_all(training.plan_of(found, tiny=tiny), csv=csv, markdown=markdown)
    return 0 if passed and all(row.note == "" for row in measured) else 1
