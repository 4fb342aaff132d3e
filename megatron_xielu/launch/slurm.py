"""A batch script for Slurm: one task per GPU, saved before the time is over, and chained."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_xielu.errors import UserError
from megatron_xielu.launch.job import Job, Setting, name_of, settings
from megatron_xielu.launch.mounts import mounts
from megatron_xielu.recipes import Recipe

# Slurm may give its notice so much earlier, so this does not make it later than asked
_MARGIN = 60
# until a first step is trained: an allowance
_START = 240
# given by launch's own options, or what a stop, a requeue or the chain relies on
_OWN = {
    *("nodes", "ntasks", "ntasks-per-node", "gpus-per-task", "gpu-bind", "time", "array"),
    *("job-name", "chdir", "open-mode", "requeue", "no-requeue", "signal", "dependency"),
}
# of the image, whose entrypoint pyxis cannot run: tini is not stopped with the shell that it
# started, for which pyxis waits (`enroot_container_start`)
_ENTRYPOINT = "/opt/megatron_xielu/entrypoint.sh"

_SCRIPT = """\
#!/bin/bash
# written by `megatron-xielu launch slurm`; what is given to sbatch beside it (a partition, an
# account) is lost with the next job of the chain, so give it to launch (--sbatch) or write it here
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
# of a node's memory --exclusive gives only what is asked for: all
#SBATCH --mem=0
#SBATCH --time={time}
#SBATCH --chdir={chdir}
#SBATCH --output=%x-%j.out
# a requeued job goes on in the same file
#SBATCH --open-mode=append
# Slurm's own requeue covers pre-emption and lost nodes; failed ranks are requeued below
#SBATCH --requeue
# notice for this script before the time is over: the ranks need up to {stop} s to save
#SBATCH --signal=B:USR1@{notice}
# jobs of this name wait for each other, so that a run's next job can be submitted early
#SBATCH --dependency=singleton
{options}
{setup}run={folder}
# the step that training goes on from
saved() {{ cat "$run"/{latest} 2>/dev/null || echo 0; }}
requeue() {{
    # Slurm then ends this script
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
}}
begun=$(saved)

# with pyxis: container=(--container-image=IMAGE --container-mounts=FOLDER:FOLDER)
container=({container})
{exports}
# --cpu-bind=none: else Slurm ties each rank, its threads and data workers to one core
# --distribution=block: consecutive ranks share a node, as tensor parallelism needs
# --wait: when a rank has failed, the others would wait for it in a collective; they get 30 s, in
#   which those that made the same mistake end with its code
srun --cpu-bind=none --distribution=block --wait=30 "${{container[@]}}" \\
    {command} &
ranks=$!

# srun hands SIGUSR1 to the ranks, which save and end with 0; of SIGTERM it kills them at once
stopped=
trap 'stopped=time; kill -USR1 $ranks 2>/dev/null' USR1
trap 'stopped=taken; kill -USR1 $ranks 2>/dev/null' TERM
# a trap ends `wait` early
while kill -0 $ranks 2>/dev/null; do wait $ranks; done
wait $ranks
code=$?

if [[ $stopped == taken ]]; then
    # pre-empted, which Slurm requeues by itself, or ended by a user
    exit $code
elif [[ $stopped == time && $code == 0 ]]; then
    if [[ $(saved) == "$begun" ]]; then
        echo "error: the time was over and nothing new is saved, so no next job: give more --time"
        exit 1
    fi
    echo "the time is over and the run is saved: its next job goes on"
    sbatch "$0" || exit 1
elif [[ $code == 0 ]]; then
    # of a pre-emption with a GraceTime the ranks hear first; a job that ends by then is over
    if scontrol show job "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]"; then
        echo "pre-empted and saved: requeued"
        requeue || exit 1
    fi
elif [[ $code != 2 ]]; then
    # --requeue does not cover this; 2 is a mistake, which would only repeat
    failure="job $SLURM_JOB_ID after step $(saved)"
    mkdir -p "$run" && echo "$failure" >>"$run"/{failures} || exit $code
    count=$(grep -cxF "$failure" "$run"/{failures})
    if ((count <= {restarts})); then
        echo "the ranks ended with $code, failure $count since the last save: requeued"
        requeue
    fi
fi
exit $code
"""
_RESTARTS = 3
# in the run folder: Megatron's, and a line for each failure. Their own modules would import torch,
# which takes seconds
_LATEST = "checkpoints/latest_checkpointed_iteration.txt"
_FAILURES = "slurm_failures.txt"


def render(
    job: Job,
    *,
    time: str,
    image: str | None = None,
    options: Sequence[str] = (),
    setup: Sequence[str] = (),
) -> str:
    """The batch script.

    Args:
        time: the limit of one job, in Slurm's words; the chain goes on after it.
        image: for pyxis, which then mounts the folder it is submitted from, the run's and the data.
        options: of sbatch's, as NAME=VALUE.
        setup: lines of shell that come before the ranks, or files of them.

    Raises:
        UserError: the recipe, the time or an option is wrong, or a folder cannot be mounted.
    """
    recipe = job.load()
    notice = job.stop_seconds + _MARGIN
    _check_time(time, job.stop_seconds, notice)
    folder = job.folder(recipe).absolute()
    program = [_ENTRYPOINT] if image else [sys.executable, "-m", "megatron_xielu"]
    variables = settings(recipe, job.megatron_flags, job.fabric)
    exports = [
        f"# {setting.reason}\nexport {setting.name}={shlex.quote(setting.value)}"
        for setting in variables
    ]
    return _SCRIPT.format(
        name=name_of(folder),
        nodes=job.nodes,
        gpus=job.gpus_per_node,
        time=time,
        stop=job.stop_seconds,
        notice=notice,
        chdir=shlex.quote(str(Path.cwd())),
        options="".join(f"#SBATCH {_option(each)}\n" for each in options),
        setup="".join(f"{_setup(each)}\n" for each in setup),
        folder=shlex.quote(str(folder)),
        latest=_LATEST,
        failures=_FAILURES,
        container=shlex.join(_container(image, job, recipe, variables)) if image else "",
        exports="\n".join(exports),
        command=shlex.join([*program, *job.arguments(folder)]),
        restarts=_RESTARTS,
    )


def _check_time(time: str, stop: int, notice: int) -> None:
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time, re.ASCII):
        raise UserError(
            f"--time {time} is no time of Slurm's: give MINUTES, HOURS:MINUTES:SECONDS or "
            "DAYS-HOURS, as in 24:00:00"
        )
    days, dash, rest = time.rpartition("-")
    units = (3600, 60, 1) if dash or rest.count(":") == 2 else (60, 1)
    seconds = int(days or 0) * 86400
    seconds += sum(int(n) * unit for n, unit in zip(rest.split(":"), units, strict=False))
    if seconds < notice + _START:
        raise UserError(
            f"--time {time} is {seconds} s, in which no job gets to train: Slurm's notice comes "
            f"{notice} s before the end (--stop-seconds {stop} and {_MARGIN}), and a start takes "
            f"up to {_START}. Give --time {-(-(notice + _START) // 60)} (minutes) or more."
        )


def _option(text: str) -> str:
    """One of sbatch's options as a line of a batch script has it."""
    found = re.fullmatch(r"(?:--)?([a-z][a-z0-9-]*)(?:=(.+))?", text)
    if found is None:
        raise UserError(
            f"--sbatch {text} must be a long option of sbatch's, as in --sbatch partition=NAME"
        )
    name, value = found.groups()
    if name in _OWN:
        raise UserError(
            f"--sbatch {text}: the script sets --{name} itself or relies on its default. Give "
            "--nodes, --gpus-per-node, --time, --stop-seconds or --run-dir instead, or change the "
            "script that is printed."
        )
    return f"--{name}" if value is None else f"--{name}={shlex.quote(value)}"


def _setup(text: str) -> str:
    return f". {shlex.quote(str(Path(text).absolute()))}" if Path(text).is_file() else text


def _container(image: str, job: Job, recipe: Recipe, variables: Sequence[Setting]) -> Iterator[str]:
    """pyxis' options."""
    yield f"--container-image={image}"
    yield "--container-mounts=" + ",".join(
        f"{mount.source}:{mount.target}" + (":ro" if mount.read_only else "")
        for mount in mounts(job, recipe)
    )
    yield f"--container-workdir={Path.cwd()}"
    # which a site may have made pyxis' default
    yield "--no-container-entrypoint"
    if variables:
        # which the image's own values would override otherwise
        yield f"--container-env={','.join(setting.name for setting in variables)}"


def submit(script: str) -> None:
    """Hand it to sbatch.

    Raises:
        UserError: there is no sbatch here, or it refuses.
    """
    try:
        subprocess.run(["sbatch"], input=script, text=True, check=True)
    except FileNotFoundError as error:
        raise UserError(
            "sbatch is not here: run this on a login node of the cluster, or keep the script and "
            "submit it there"
        ) from error
    except subprocess.CalledProcessError as error:
        raise UserError("sbatch refused the script; what it said stands above") from error
