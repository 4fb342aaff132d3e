"""A Hugging Face folder: its tensors, and stock transformers' own model of it, matrix by matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.hf_config import check_types, read_architecture
from megatron_xielu.checkpoint.mapping import EMBEDDING, LM_HEAD
from megatron_xielu.checkpoint.row_blocks import Round, linear, row_ranges
from megatron_xielu.checkpoint.safetensors_file import TensorSpec
from megatron_xielu.checkpoint.targets import TARGETS
from megatron_xielu.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No notices and progress bars of transformers inside; its own settings come back after."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_config(hf_dir: Path) -> dict[str, Any]:
    """config.json; raises UserError if the folder has none that can be read."""
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"{hf_dir} is not a Hugging Face model folder: it has no config.json.")
    config = read_json(path)
    check_types(config, path)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON; raises UserError if the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}). Get the folder again.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds {type(content).__name__} in place of names and values. Get the folder "
            f"again."
        )
    return content


def tensor_files(hf_dir: Path) -> dict[str, Path]:
    """The file of every tensor, chosen as transformers chooses.

    That is model.safetensors, else what the index names, whatever lies beside them; a folder with
    neither counts as a whole.

    Raises:
        UserError: there are none, one is damaged, the index and the files disagree, or two files
            hold tensors of one name.
    """
    hf_dir = Path(hf_dir)
    if (single := hf_dir / SINGLE_FILE).is_file():
        return dict.fromkeys(_names(single), single)
    if (index := hf_dir / INDEX_FILE).is_file():
        return _indexed_files(index)
    files: dict[str, Path] = {}
    for path in sorted(hf_dir.glob("*.safetensors")):
        for name in _names(path):
            if name in files:
                raise UserError(
                    f"{files[name]} and {path} both hold {name}, and no {INDEX_FILE} says which "
                    f"counts. Remove the files that are not this model's."
                )
            files[name] = path
    if not files:
        pickled = sorted(path.name for path in hf_dir.glob("*.bin"))
        remedy = (
            f" {pickled[0]} is a pickle, which can run code and is not read: load it where you "
            f"trust it and save it with save_pretrained, which writes safetensors."
            if pickled
            else ""
        )
        raise UserError(f"{hf_dir} holds no safetensors file.{remedy}")
    return files


def _indexed_files(index: Path) -> dict[str, Path]:
    """The index's weight_map, held against the files that it names."""
    weight_map = read_json(index).get("weight_map")
    plain = isinstance(weight_map, dict) and all(
        isinstance(file, str) and file == Path(file).name for file in weight_map.values()
    )
    if not weight_map or not plain:
        raise UserError(
            f"{index} has no weight_map from tensors to files beside it. Get the file again."
        )
    files = {name: index.parent / file for name, file in weight_map.items()}
    needed = sorted(set(files.values()))
    if missing := [path for path in needed if not path.is_file()]:
        raise UserError(
            f"{missing[0]} is missing: {INDEX_FILE} names {len(needed)} files, {len(missing)} of "
            f"them are not there. Get the folder again."
        )
    for path in needed:
        named = {name for name, file in files.items() if file == path}
        if wrong := sorted(named ^ _names(path)):
            which = "lacks {}, which" if wrong[0] in named else "holds {}, which no entry of"
            raise UserError(
                f"{path} {which.format(wrong[0])} {INDEX_FILE} names for it: they are of two "
                f"saves. Get the folder again."
            )
    return files


def _names(path: Path) -> set[str]:
    """What a file holds."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged: {error}. Convert again, or get the file again."
        ) from error


def read_tensors(files: dict[str, Path], names: Sequence[str]) -> list[Tensor]:
    """The named tensors, in order."""
    from safetensors import safe_open

    tensors = []
    for name in names:
        with safe_open(files[name], framework="pt") as file:
            tensors.append(file.get_tensor(name))
    return tensors


class HfFolder:
    """The tensors of a folder, and the logits that stock transformers makes of them.

    Raises:
        UserError: the folder is none, is damaged, or of an architecture that is not known here.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = load_config(self.path)
        if self.config.get("model_type") not in TARGETS:
            raise UserError(
                f"{self.path} holds a model of type {self.config.get('model_type')!r}; known are "
                f"{', '.join(TARGETS)}."
            )
        self.target = TARGETS[self.config["model_type"]]
        self.tied = bool(self.config.get("tie_word_embeddings"))
        self._files = tensor_files(self.path)
        self.specs = dict(self._read_specs())

    @cached_property
    def arch(self) -> Architecture:
        """What config.json means; raises UserError, see `read_architecture`."""
        return read_architecture(self.config, self.target, self.path / "config.json")

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored."""
        return read_tensors(self._files, [name])[0]

    def rows(self, name: str, index: slice | EllipsisType) -> Tensor:
        """The rows of a tensor, as they are stored, without the rest of it."""
        from safetensors import safe_open

        # opened anew, for what was read of an open file counts as this process's memory
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_slice(name)[index]
        return tensor

    def blocks(self, name: str) -> Iterator[Tensor]:
        """What `read` returns, a few rows at a time; only those are in memory."""
        return (self.rows(name, rows) for rows in row_ranges(self.specs[name].shape))

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that transformers needs for this config.json."""
        shapes = {name: tuple(t.shape) for name, t in self._empty_model().state_dict().items()}
        if self.tied:
            del shapes["lm_head.weight"]
        return shapes

    def logits(
        self,
        prompts: Sequence[Sequence[int]],
        rounded: Round = lambda name, rows: rows,
        *,
        as_loaded: bool = False,
    ) -> list[Tensor]:
        """fp32 logits (tokens, vocabulary) of transformers' own model, for each prompt.

        Matrices are read, and become fp32, a few rows at a time while they are multiplied with, and
        of the embedding only the tokens' rows are read: memory is that of the activations.

        Args:
            rounded: rows of a tensor, by its name, to what is computed with.
            as_loaded: round what `from_pretrained` would round whatever the dtype: it builds
                Arcee's xIELU in bf16.
        """
        lengths = [len(prompt) for prompt in prompts]
        # what follows a token cannot change its logits, so shorter prompts may be filled up
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(list(prompt))
        valid = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        with quiet_transformers(), torch.inference_mode():
            model = self._streaming_model(rounded, as_loaded=as_loaded)
            hidden = model.model(inputs_embeds=self._embedded(ids, rounded), use_cache=False)
            logits: Tensor = model.lm_head(hidden.last_hidden_state[valid])
        return list(logits.split(lengths))

    def rounds_when_loaded(self) -> bool:
        """Whether `from_pretrained(dtype=torch.float32)` changes a stored value."""
        expected = self._empty_model().state_dict()
        return any(
            spec.dtype.itemsize > expected[name].dtype.itemsize
            for name, spec in self.specs.items()
            if name in expected
        )

    def _embedded(self, ids: Tensor, rounded: Round) -> Tensor:
        """The rows of the embedding, (*ids.shape, hidden)."""
        asked, place = ids.unique(return_inverse=True)
        rows = [self.rows(EMBEDDING, slice(token, token + 1)) for token in asked.tolist()]
        return rounded(EMBEDDING, torch.cat(rows)).float()[place]

    def _streaming_model(self, rounded: Round, *, as_loaded: bool) -> Any:
        """The model without an embedding, whose linear layers read their matrices at the call."""

        def blocks(name: str) -> Iterator[Tensor]:
            return (rounded(name, rows) for rows in self.blocks(name))

        model = self._empty_model()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                weight = f"{name}.weight"
                stored = EMBEDDING if self.tied and weight == LM_HEAD else weight
                model.set_submodule(name, _Streamed(module, partial(blocks, stored)))
        # copies, because each that is not would keep a whole file mapped
        rest = {
            name: rounded(name, self.read(name)).to(
                empty.dtype if as_loaded else torch.float32, copy=True
            )
            for name, empty in model.state_dict().items()
            if name != EMBEDDING
        }
        model.load_state_dict(rest, strict=False, assign=True)
        return model

    def _empty_model(self) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        with quiet_transformers():
            config: Any = AutoConfig.from_pretrained(str(self.path), local_files_only=True)
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            # its frequencies are computed, not loaded
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
        return model.eval()

    def _read_specs(self) -> Iterator[tuple[str, TensorSpec]]:
        from safetensors import safe_open

        for path in sorted(set(self._files.values())):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    part = file.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise UserError(
                            f"{path}: {name} is stored as {part.get_dtype()}; known are "
                            f"{', '.join(_DTYPES)}. Quantized models are not read."
                        )
                    yield name, TensorSpec(_DTYPES[part.get_dtype()], tuple(part.get_shape()))


def load_exact(hf_dir: Path) -> Any:
    """The model in fp32, whole, with its alphas exactly as exported.

    `ACT2FN["xielu"]` builds Arcee's activation in bf16 whatever the model's dtype, and loading
    casts to that; the files hold fp32, which comes back here.
    """
    from transformers import AutoModelForCausalLM

    files = HfFolder(hf_dir)._files
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(hf_dir), dtype=torch.float32, local_files_only=True
        )
    names = [name for name in files if ".act_fn." in name]
    for name, module in model.named_modules():
        if name.endswith(".act_fn"):
            module.float()
    state = dict(zip(names, read_tensors(files, names), strict=True))
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    assert not unexpected, unexpected
    return model.eval()


class _Streamed(nn.Module):
    """A linear layer whose weight comes in blocks."""

    def __init__(self, layer: nn.Linear, blocks: Callable[[], Iterator[Tensor]]) -> None:
        super().__init__()
        self.rows, self.bias = layer.out_features, layer.bias
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) to (..., rows)."""
        y = linear(x, self.blocks(), self.rows)
        return y if self.bias is None else y + self.bias
