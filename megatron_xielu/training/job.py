"""What a run is to be: a request, checked against its recipe, data and machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_xielu.data.manifest import DatasetInfo, check_dataset, load_info
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, check, megatron_args
from megatron_xielu.training import launch, transformer_engine
from megatron_xielu.training.resolve import Machine, fuses_weight_gradients, resolve

# Megatron's own ways to name data
_DATA_FLAGS = {
    "--mock-data",
    "--data-path",
    "--train-data-path",
    "--data-args-path",
    "--per-split-data-args-path",
}


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    recipe: str
    """A preset's name or a YAML file."""
    overrides: tuple[str, ...] = ()
    run_dir: Path | None = None
    """None means runs/ and the recipe's name."""
    nproc: int | None = None
    """Ranks to start; None means one per GPU, or as many as the model is cut into."""
    megatron_flags: tuple[str, ...] = ()
    allow_changed: tuple[str, ...] = ()
    """Recipe keys that may differ from the saved run's although they change its result."""


@dataclass(frozen=True)
class Job:
    """A request that passed every check."""

    recipe: Recipe
    run_dir: Path
    world_size: int
    machine: Machine
    megatron_flags: tuple[str, ...]
    data: DatasetInfo | None
    allow_changed: tuple[str, ...]

    def argv(self) -> list[str]:
        """Megatron's flags; the user's own come last, and the last one wins."""
        recipe = self.recipe
        flags = megatron_args(
            recipe,
            world_size=self.world_size,
            device=self.machine.device,
            run_dir=self.run_dir,
            precision=recipe.training.precision,  # type: ignore[arg-type]
            transformer_impl=recipe.model.transformer_impl,  # type: ignore[arg-type]
            gradient_accumulation_fusion=fuses_weight_gradients(
                self.machine, recipe.model.transformer_impl
            ),
            # Megatron names its index files by the data's path alone
            cache=self.data.train.sha256[:12] if self.data else "",
        )
        return [*flags, *self.megatron_flags]


def make_job(
    request: Request, recipe: Recipe, machine: Machine, *, check_data: bool, starting: bool = True
) -> Job:
    """Check a request as a whole.

    Args:
        recipe: as the request names it, with its overrides.
        check_data: read the data folder, too.
        starting: on this machine, whose GPUs are a limit then.

    Raises:
        UserError: about recipe, data, ranks or TransformerEngine.
    """
    parallel = recipe.parallel
    pieces = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    world_size = request.nproc or (machine.num_gpus if starting else 0) or pieces
    if launch.is_rank():
        world_size = launch.world_size()
        if starting and 0 < machine.num_gpus <= launch.local_rank():
            raise UserError(
                f"no GPU is left for this rank: {launch.local_world_size()} ranks were started on "
                f"its machine, and it sees {machine.num_gpus} of the GPUs. Start one for each GPU "
                "(torchrun --nproc-per-node), and let each of them see all of its machine's (srun "
                "--gpus-per-node, without --gpus-per-task and --gpu-bind)"
            )
    elif starting and 0 < machine.num_gpus < max(world_size, pieces):
        raise UserError(
            f"the run needs {max(world_size, pieces)} GPUs (tensor x pipeline parallelism is "
            f"{pieces}), this machine has {machine.num_gpus}: set --nproc and "
            "parallel.tensor_model_parallel_size to what it has, or use more machines with torchrun"
        )
    check(recipe, world_size)
    data = _data(recipe, request.megatron_flags) if check_data else None
    resolved = resolve(recipe, machine, data)
    check(resolved, world_size)
    _check_resolved(resolved)
    _check_transformer_engine(resolved, machine)
    folder = (request.run_dir or Path("runs") / recipe.name).absolute()
    allowed = request.allow_changed
    return Job(resolved, folder, world_size, machine, request.megatron_flags, data, allowed)


def _check_transformer_engine(recipe: Recipe, machine: Machine) -> None:
    # a plan for GPUs needs none; of a machine's ranks one asks, or the process that starts them
    if launch.is_child() or (launch.is_rank() and launch.local_rank() > 0) or not machine.num_gpus:
        return
    if recipe.model.transformer_impl == "transformer_engine":
        transformer_engine.check(recipe.fp8.recipe, transformer_engine.probe())


def _check_resolved(recipe: Recipe) -> None:
    derived = {
        "model.vocab_size": recipe.model.vocab_size,
        "logging.eval_iters": recipe.logging.eval_iters,
    }
    missing = [name for name, value in derived.items() if value is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} would come from the data, but data.path is not set: set it, "
            f"or give {' '.join(f'{name}=NUMBER' for name in missing)}"
        )


def _data(recipe: Recipe, flags: Sequence[str]) -> DatasetInfo | None:
    if recipe.data.path is None:
        if _DATA_FLAGS.intersection(flags):
            return None
        raise UserError(
            "data.path is not set: write a data folder with `megatron-xielu prepare-data DIR` and "
            "give data.path=DIR"
        )
    folder = Path(recipe.data.path)
    # one process of a machine reads the files, the others only need the manifest
    if launch.is_child() or (launch.is_rank() and launch.local_rank() > 0):
        return load_info(folder)
    return check_dataset(folder, vocab_size=recipe.model.vocab_size, progress=print)
