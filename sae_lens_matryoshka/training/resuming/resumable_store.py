"""SAELens's activation store with a position that can be saved and taken up again, down to the token.

The data's way is SAELens's own: data set rows -> tokens -> sequences of ``context_size`` -> activations -> mixing
buffer -> batches. SAELens's checkpoints hold the number of rows read; here also the tokens of the last row that no
sequence has taken yet, the activations in the buffer and the random states. Everything after is then the same, bit for
bit. A SAELens that reads such a checkpoint finds its own number of rows in it.
"""

import json
import logging
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Float, Int
from sae_lens import ActivationsStore, LanguageModelSAETrainingRunner, MultiSAETrainingRunner
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.tokenization_and_batching import _add_tokens_to_batch
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import Self, override

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.text.token_data import check_token_data
from sae_lens_matryoshka.training.resuming.checked_store import CheckedActivationsStore
from sae_lens_matryoshka.training.resuming.mixing_buffer import ResumableMixingBuffer
from sae_lens_matryoshka.training.resuming.random_states import random_states, set_random_states

logger = logging.getLogger(__name__)

POSITION_FILENAME = "activations_store_position.json"


@dataclass
class TextPosition:
    """Where in the data set the next sequence begins."""

    n_rows_read: int = 0
    """Rows read in this epoch."""

    leftover_tokens: Int[Tensor, " any"] | None = None
    """The end of the last row read, which no sequence has taken yet."""

    dataset_state: dict[str, Any] | None = None
    """A streamed data set's own state to start from; None at its beginning and for other data sets."""

    started: bool = False
    """Whether a row has been read since; a streamed data set's state is another one's until then."""


def take_over_store(
    runner: "LanguageModelSAETrainingRunner | MultiSAETrainingRunner", exact: bool, max_buffer_bytes: int
) -> None:
    """Give a runner that has not started a store that names what is wrong with its data set.

    Args:
        runner: SAELens's runner, its data set and model loaded.
        exact: Whether the store's checkpoints hold everything that decides on the batches to come.
        max_buffer_bytes: The largest activation buffer to save. A larger one is left out of checkpoints.

    Raises:
        UserError: If the data set cannot be used with the run's settings and model.
    """
    check_token_data(runner.activations_store, runner.cfg)
    if exact and runner.cfg.prefetch_llm_batches:
        logger.warning(
            "prefetch_llm_batches reads ahead of training in a thread of its own, so checkpoints are SAELens's: a "
            "resumed run is not bit-equal. Set prefetch_llm_batches=false for an exact resume."
        )
        exact = False
    if exact:
        store = ResumableActivationsStore.take_over(runner.activations_store, max_buffer_bytes)
    else:
        store = CheckedActivationsStore.take_over(runner.activations_store)
    runner.activations_store = runner.evaluator.activations_store = store


class ResumableActivationsStore(CheckedActivationsStore):
    """A store whose checkpoints hold everything that decides on the batches to come.

    The order of the data is SAELens's: the same rows, sequences and buffer, shuffled by a generator that starts as a
    copy of torch's global one and that nobody else draws from.
    """

    max_buffer_bytes: int
    mixing_buffer: ResumableMixingBuffer | None = None
    _position: TextPosition

    @override
    @classmethod
    def take_over(cls, store: ActivationsStore, max_buffer_bytes: int = sys.maxsize) -> Self:
        """As for :class:`CheckedActivationsStore`.

        Args:
            store: A store that has not been read from. Use the new one in its place.
            max_buffer_bytes: The largest buffer that is saved. A larger one is left out of checkpoints.
        """
        resumable = super().take_over(store)
        resumable.max_buffer_bytes = max_buffer_bytes
        if resumable.dataset is None:
            resumable._position = TextPosition()
        return resumable

    # rows and sequences

    @override
    def _iterate_tokenized_sequences(self) -> Generator[Int[Tensor, " context_size"], None, None]:
        """SAELens's sequences from the beginning of the data set; called at the start of every epoch."""
        self._position = TextPosition()
        self._begin_pass()
        return self._sequences()

    def _sequences(self) -> Generator[Int[Tensor, " context_size"], None, None]:
        """SAELens's ``concat_and_batch_sequences`` from the position on, noting what is left of the last row."""
        if self.is_dataset_tokenized or self.disable_concat_sequences:
            # a row makes one sequence or none: nothing of it is left over
            yield from super()._iterate_tokenized_sequences()
            return
        position = self._position
        tokenizer: Any = getattr(self.model, "tokenizer", None)
        bos = tokenizer.bos_token_id if tokenizer is not None and self.prepend_bos else None
        separator = None if tokenizer is None else get_special_token_from_cfg(self.sequence_separator_token, tokenizer)
        leftover = [] if position.leftover_tokens is None else [position.leftover_tokens.to(self.device)]
        sequence: Tensor | None = None
        for tokens in chain(leftover, self._iterate_raw_dataset_tokens()):
            offset = 0
            while offset < tokens.shape[0]:
                sequence, offset, _ = _add_tokens_to_batch(
                    batch=sequence,
                    tokens=tokens,
                    offset=offset,
                    context_size=self.context_size,
                    is_start_of_sequence=offset == 0,  # of no consequence without a begin_sequence_token_id
                    begin_batch_token_id=bos,
                    sequence_separator_token_id=separator,
                )
                if sequence.shape[0] == self.context_size:
                    position.leftover_tokens = tokens[offset:]
                    yield sequence
                    sequence = None

    @override
    def _iterate_raw_dataset(self) -> Generator[Any, None, None]:
        position = self._position
        if position.n_rows_read > 0:  # SAELens counts a row when the next one is wanted
            self.n_dataset_processed += 1
        for row in self._rows_after(position):
            position.n_rows_read += 1
            position.started = True
            yield self._value(row, position.n_rows_read)
            self.n_dataset_processed += 1

    def _rows_after(self, position: TextPosition) -> Iterator[Any]:
        if not isinstance(self.dataset, IterableDataset):
            return iter(cast(Dataset, self.dataset).skip(position.n_rows_read))
        self.dataset.load_state_dict(position.dataset_state or {})  # an empty state is the beginning
        # a checkpoint made without streaming has no state of the stream: read up to its position
        n_rows_to_pass = position.n_rows_read if position.dataset_state is None else 0
        return islice(self.dataset, n_rows_to_pass, None)

    # activations

    @override
    def get_data_loader(self) -> Iterator[Tensor]:
        return self._new_buffer(self._iterate_filtered_activations())

    @override
    def get_multi_hook_data_loader(self) -> Iterator[dict[str, Tensor]]:
        assert self._hook_names is not None
        assert self._hook_d_ins is not None
        hook_names, widths = self._hook_names, [self._hook_d_ins[name] for name in self._hook_names]
        # side by side, as SAELens does it, so that all hooks are shuffled alike
        packed = (
            torch.cat([activations[name] for name in hook_names], dim=1)
            for activations in self._iterate_filtered_multi_hook_activations()
        )
        batches = self._new_buffer(packed)
        return (dict(zip(hook_names, batch.split(widths, dim=1), strict=True)) for batch in batches)

    def _new_buffer(self, activations: Iterator[Tensor]) -> ResumableMixingBuffer:
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())  # so that a seed gives the order that it gives in SAELens
        self.mixing_buffer = ResumableMixingBuffer(
            self._finite(activations),
            buffer_size=self.n_batches_in_buffer * self.training_context_size,
            batch_size=self.train_batch_size_tokens,
            mix_fraction=self.activations_mixing_fraction,
            generator=generator,
        )
        return self.mixing_buffer

    def _finite(self, activations: Iterator[Tensor]) -> Iterator[Tensor]:
        for batch in activations:
            self.check_finite(batch)
            yield batch

    def check_finite(self, activations: Tensor) -> None:
        """Refuse activations that are not finite.

        Raises:
            UserError: If some are not.
        """
        if not activations.isfinite().all():
            where = "the cached activations" if self.dataset is None else f"row {self._position.n_rows_read}"
            raise UserError(
                f"The model's activations hold {int((~activations.isfinite()).sum())} values that are not finite, of "
                f"{activations.numel()}, around {where} of the data set; try a wider dtype or autocast_lm=false"
            )

    def activations_of_hooks(
        self, tokens: Int[Tensor, "sequences context_size"]
    ) -> dict[str, Float[Tensor, "sequences positions d_in"]]:
        """What the model makes of sequences at each hook, at the positions that ``seqpos_slice`` leaves."""
        if self._hook_names is None:
            return {self.hook_name: self.get_activations(tokens)}
        return self.get_multi_hook_activations(tokens)

    # checkpoints

    @override
    def state_dict(self) -> dict[str, Tensor]:
        tensors = super().state_dict()
        if self._position.leftover_tokens is not None:
            tensors["leftover_tokens"] = self._position.leftover_tokens.clone()
        if self.mixing_buffer is not None:
            tensors["random_state.mixing_buffer"] = self.mixing_buffer.generator.get_state()
            if self.mixing_buffer.activations is not None and self._buffer_bytes() <= self.max_buffer_bytes:
                tensors["mixing_buffer"] = self.mixing_buffer.activations.contiguous()
        tensors.update(random_states()[0])
        return tensors

    @override
    def save_to_checkpoint(self, checkpoint_path: str | Path) -> None:
        super().save_to_checkpoint(checkpoint_path)
        dataset_state = self._position.dataset_state
        if isinstance(self.dataset, IterableDataset) and self._position.started:
            dataset_state = self.dataset.state_dict()
        position = {
            "n_rows_read": self._position.n_rows_read,
            "dataset_state": dataset_state,
            "current_row_idx": getattr(self, "current_row_idx", None),  # of cached activations
            "n_batches_ready": 0 if self.mixing_buffer is None else self.mixing_buffer.n_batches_ready,
            "buffer_is_saved": self._buffer_bytes() <= self.max_buffer_bytes,
            "random_states": random_states()[1],
        }
        (Path(checkpoint_path) / POSITION_FILENAME).write_text(json.dumps(position), encoding="utf-8")
        if self._buffer_bytes() > self.max_buffer_bytes:
            logger.warning(
                f"The activation buffer takes {self._buffer_bytes() / 1e9:.2f} GB, more than the "
                f"{self.max_buffer_bytes / 1e9:.2f} GB that --max-buffer-gb allows, and is not in the checkpoint: a "
                f"run that resumes from it fills a new buffer and is not bit-equal to this one."
            )

    @override
    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        path = Path(checkpoint_path) / POSITION_FILENAME
        if not path.is_file():
            logger.warning(
                f"{checkpoint_path} was made without exact resuming: the run goes on with SAELens's position in the "
                f"data set, a new activation buffer and other random numbers, so it is not bit-equal."
            )
            super().load_from_checkpoint(checkpoint_path)
            return
        position = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME)
        self.n_dataset_processed = int(tensors["n_dataset_processed"])
        self._position = TextPosition(
            position["n_rows_read"], tensors.get("leftover_tokens"), position["dataset_state"]
        )
        if self.dataset is not None:
            self.iterable_sequences = self._sequences()
        if position["current_row_idx"] is not None:
            self.current_row_idx = position["current_row_idx"]
        if self.mixing_buffer is None:
            self._dataloader = self.get_data_loader()
        self._load_buffer(position, tensors)
        set_random_states(tensors, position["random_states"])

    def _load_buffer(self, position: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        assert self.mixing_buffer is not None
        if "random_state.mixing_buffer" in tensors:
            self.mixing_buffer.generator.set_state(tensors["random_state.mixing_buffer"])
        if "mixing_buffer" in tensors:
            self.mixing_buffer.activations = tensors["mixing_buffer"].to(self.device)
            self.mixing_buffer.n_batches_ready = position["n_batches_ready"]
        elif not position["buffer_is_saved"]:
            logger.warning(
                "The checkpoint is without its activation buffer, which was larger than --max-buffer-gb: a new one is "
                "filled, so the run is not bit-equal to an uninterrupted one."
            )

    def _buffer_bytes(self) -> int:
        activations = None if self.mixing_buffer is None else self.mixing_buffer.activations
        return 0 if activations is None else activations.numel() * activations.element_size()
