"""A batch script for Slurm: one task per GPU, saved before the time is over, and chained."""

from __future__ import annotations

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

_SCRIPT = """\
#!/bin/bash
# written by `megatron-xielu launch slurm`; what is given to sbatch beside it (a partition, an
# account) is lost with the next job of the chain, so write it here
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --time={time}
#SBATCH --output=%x-%j.out
# a requeued job goes on in the same file
#SBATCH --open-mode=append
# Slurm's own requeue covers pre-emption and lost nodes; failed ranks are requeued below
#SBATCH --requeue
# notice for this script before the time is over: the ranks need up to {stop} s to save
#SBATCH --signal=B:USR1@{notice}
# jobs of this name wait for each other, so that a run's next job can be submitted early
#SBATCH --dependency=singleton

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

# srun hands both to the ranks, which save and end with 0
stopped=
trap 'stopped=time; kill -USR1 $ranks 2>/dev/null' USR1
trap 'stopped=taken; kill -TERM $ranks 2>/dev/null' TERM
# a trap ends `wait` early
while kill -0 $ranks 2>/dev/null; do wait $ranks; done
wait $ranks
code=$?

if [[ $stopped == taken ]]; then
    # pre-empted, which Slurm requeues by itself, or cancelled
    exit $code
elif [[ $stopped == time && $code == 0 ]]; then
    echo "the time is over and the run is saved: its next job goes on"
    env --unset=SLURM_RESTART_COUNT sbatch "$0"
elif [[ $code != 0 && $code != 2 && ${{SLURM_RESTART_COUNT:-0}} -lt {restarts} ]]; then
    # --requeue does not cover this; 2 is a mistake, which would only repeat
    echo "the ranks ended with $code: requeued, start $((${{SLURM_RESTART_COUNT:-0}} + 2))"
    scontrol requeue "$SLURM_JOB_ID"
    # Slurm ends this script
    sleep 60
fi
exit $code
"""
_RESTARTS = 3


def render(job: Job, *, time: str, image: str | None = None) -> str:
    """The batch script.

    Args:
        time: the limit of one job, in Slurm's words; the chain goes on after it.
        image: for pyxis, which then mounts the folder it is submitted from, the run's and the data.

    Raises:
        UserError: the recipe is wrong, or a folder cannot be mounted.
    """
    recipe = job.load()
    folder = job.folder(recipe).absolute()
    program = ["megatron-xielu"] if image else [sys.executable, "-m", "megatron_xielu"]
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
        notice=job.stop_seconds + _MARGIN,
        container=shlex.join(_container(image, job, recipe, variables)) if image else "",
        exports="\n".join(exports),
        command=shlex.join([*program, *job.arguments(folder)]),
        restarts=_RESTARTS,
    )


def _container(image: str, job: Job, recipe: Recipe, variables: Sequence[Setting]) -> Iterator[str]:
    """pyxis' options."""
    yield f"--container-image={image}"
    yield "--container-mounts=" + ",".join(
        f"{mount.source}:{mount.target}" + (":ro" if mount.read_only else "")
        for mount in mounts(job, recipe)
    )
    yield f"--container-workdir={Path.cwd()}"
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
