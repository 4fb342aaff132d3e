"""The datasets of a run, with the same held-out samples at every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.training import get_args, get_tokenizer
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage


class Datasets:
    """Megatron's dataset provider, and a fresh iterator for each evaluation.

    Megatron goes on in the validation set from one evaluation to the next, so that two losses of a
    run are of different text. Here the validation set has the samples of one evaluation, and every
    evaluation starts at its first.
    """

    # every rank calls the builder, which has collectives of its own
    is_distributed = True

    def __init__(self) -> None:
        self._loaders: list[Any] = []

    def __call__(self, num_samples: Sequence[int], vp_stage: int | None = None) -> Any:
        """Returns (train, valid, test) datasets of this rank, each None where it reads none."""
        args = get_args()
        blend, blend_per_split = get_blend_and_blend_per_split(args)
        config = GPTDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            blend=blend,
            blend_per_split=blend_per_split,
            split=args.split,
            num_dataset_builder_threads=args.num_dataset_builder_threads,
            path_to_cache=args.data_cache_path,
            mmap_bin_files=args.mmap_bin_files,
            tokenizer=get_tokenizer(),
            reset_position_ids=args.reset_position_ids,
            reset_attention_mask=args.reset_attention_mask,
            eod_mask_loss=args.eod_mask_loss,
            create_attention_mask=args.create_attention_mask_in_dataloader,
        )

        def built_here() -> bool:
            ends = is_first_or_last_pipeline_stage(vp_stage)
            return ends and mpu.get_tensor_model_parallel_rank() == 0

        train, _, test = num_samples
        sizes = (train, args.eval_iters * args.eval_global_batch_size, test)
        dataset = MockGPTDataset if args.mock_data else GPTDataset
        built = BlendedMegatronDatasetBuilder(dataset, sizes, built_here, config).build()
        # Megatron would start its own iterator after what earlier evaluations have read
        args.consumed_valid_samples = 0
        self._loaders.append(build_pretraining_data_loader(built[1], 0))
        return built

    def from_the_first(self, iterators: Any) -> Any:
        """What replaces Megatron's validation iterator, or its list of one per model chunk."""
        fresh = [None if it is None else RerunDataIterator(iter(it)) for it in self._loaders]
        return fresh if isinstance(iterators, list) else fresh[0]
