"""SAELens's activation store, which ends where nothing comes of its data set and names a row that it cannot use.

SAELens goes through a data set again and again until there are activations enough. Where a setting leaves out all of
them, it does so for ever.
"""

from collections.abc import Callable, Generator
from typing import Any, TypeVar

from datasets import Dataset
from sae_lens import ActivationsStore
from torch import Tensor
from typing_extensions import Self, override

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.text.data_files import shown
from sae_lens_matryoshka.text.data_set import value_check
from sae_lens_matryoshka.text.token_data import vocabulary_size

Activations = TypeVar("Activations", Tensor, dict[str, Tensor])

MAX_TOKENS_WITHOUT_ACTIVATION = 50_000
"""When so many tokens one after the other have given no activation, a run ends without waiting for a whole pass."""


class CheckedActivationsStore(ActivationsStore):
    """A store that raises a :class:`UserError` instead of reading on for ever or failing at a row without naming it."""

    _check_value: Callable[[Any, str], None]
    _vocabulary_size: int | None
    _n_rows: int = 0
    """Rows read since this pass began, or was taken up from a checkpoint."""
    _row: str = ""
    """The row that was read last, as it is named to the user."""
    _n_row_tokens: int = 0
    _longest_row: int = 0
    _n_tokens_without_activation: int = 0
    """Tokens that the model has read since the last activation that was not left out."""
    _n_ends_without_activation: int = 0
    """Ends of the data set that have been met since then."""

    @classmethod
    def take_over(cls, store: ActivationsStore) -> Self:
        """A checked store with the model, data set and settings of one that a SAELens runner has built.

        Args:
            store: A store that has not been read from. Use the new one in its place.

        Raises:
            UserError: If its context has room for nothing but BOS.
        """
        checked = cls.__new__(cls)
        checked.__dict__.update(store.__dict__)
        if checked.dataset is None:
            return checked  # cached activations
        checked._check_value = value_check(checked.tokens_column, checked.use_chat_formatting, checked.context_size)
        checked._vocabulary_size = vocabulary_size(checked.model)
        if not checked.is_dataset_tokenized:
            if checked.prepend_bos and checked.context_size == 1:
                raise UserError("context_size=1 has room for BOS alone; raise it, or set prepend_bos=false.")
        elif isinstance(checked.dataset, Dataset):
            # SAELens has asked for tensors, which datasets 3 cannot give beside new releases of torchvision
            checked.dataset.set_format(None, columns=[checked.tokens_column])
        checked.iterable_sequences = checked._iterate_tokenized_sequences()
        return checked

    # rows

    @override
    def _iterate_tokenized_sequences(self) -> Generator[Tensor, None, None]:
        self._begin_pass()
        return super()._iterate_tokenized_sequences()

    def _begin_pass(self) -> None:
        self._n_rows = self._n_row_tokens = self._longest_row = 0

    @override
    def _iterate_raw_dataset(self) -> Generator[Any, None, None]:
        assert self.dataset is not None
        for row in self.dataset:
            yield self._value(row, self._n_rows + 1)
            self.n_dataset_processed += 1

    def _value(self, row: Any, number: int) -> Any:
        """What a row holds to train on, looked at."""
        self._n_rows += 1
        self._row = f"Row {number} of the data set"
        value = row.get(self.tokens_column)
        if isinstance(value, Tensor):  # as a data set from the Hub may give it
            value = value.tolist()
        self._check_value(value, self._row)
        if self.is_dataset_tokenized and self._vocabulary_size is not None and max(value) >= self._vocabulary_size:
            raise self._unknown_token(max(value))
        return value

    def _unknown_token(self, token_id: int) -> UserError:
        made = "holds" if self.is_dataset_tokenized else "gives, by the model's tokenizer,"
        remedy = "these are another tokenizer's" if self.is_dataset_tokenized else "take that piece of text out of it"
        return UserError(
            f"{self._row} {made} the token id {token_id}, but the model has embeddings for {self._vocabulary_size} "
            f"tokens; {remedy}"
        )

    @override
    def _iterate_raw_dataset_tokens(self) -> Generator[Tensor, None, None]:
        for tokens in super()._iterate_raw_dataset_tokens():
            self._n_row_tokens += len(tokens)
            self._longest_row = max(self._longest_row, len(tokens))
            if self._vocabulary_size is not None and len(tokens) and int(tokens.max()) >= self._vocabulary_size:
                raise self._unknown_token(int(tokens.max()))
            yield tokens

    # activations

    @override
    def get_filtered_llm_batch(self, raise_on_epoch_end: bool = False) -> Tensor:
        return self.watched(super().get_filtered_llm_batch, raise_on_epoch_end)

    @override
    def _get_filtered_multi_hook_llm_batch(self, raise_on_epoch_end: bool = False) -> dict[str, Tensor]:
        return self.watched(super()._get_filtered_multi_hook_llm_batch, raise_on_epoch_end)

    def watched(self, get_batch: Callable[[bool], Activations], raise_on_epoch_end: bool) -> Activations:
        """A batch of activations, of which some are kept at least now and then.

        Args:
            get_batch: Gives the batch, or raises StopIteration at the end of the data set.
            raise_on_epoch_end: Whether the end is for the caller to deal with.

        Raises:
            UserError: If nothing comes of the data set.
            StopIteration: At its end.
        """
        try:
            batch = get_batch(raise_on_epoch_end)
        except StopIteration:
            if not raise_on_epoch_end:  # a pass has just begun, and is over
                raise UserError(self.why_no_sequence()) from None
            self._n_ends_without_activation += 1
            if self._n_ends_without_activation > 1:
                raise UserError(self._why_no_activation()) from None
            raise
        if len(batch if isinstance(batch, Tensor) else next(iter(batch.values()))):
            self._n_tokens_without_activation = self._n_ends_without_activation = 0
            return batch
        self._n_tokens_without_activation += self.store_batch_size_prompts * self.context_size
        if self._n_tokens_without_activation > MAX_TOKENS_WITHOUT_ACTIVATION:
            raise UserError(self._why_no_activation())
        return batch

    def _why_no_activation(self) -> str:
        assert self.exclude_special_tokens is not None
        sliced = "" if self.seqpos_slice == (None,) else f" with seqpos_slice={self.seqpos_slice}"
        return (
            f"exclude_special_tokens={shown(self.exclude_special_tokens.tolist())} leaves out all of the "
            f"{self._n_tokens_without_activation:,} tokens read{sliced}, so there is nothing to train on; exclude fewer"
        )

    def why_no_sequence(self) -> str:
        """Why a pass over the data set has given no sequence."""
        if self._n_row_tokens == 0:
            return f"None of the {self._n_rows:,} rows of the data set holds any token, so there is nothing to train on"
        if self.disable_concat_sequences:
            return (
                f"disable_concat_sequences=true leaves out rows shorter than context_size={self.context_size}, but the "
                f"longest of {self._n_rows:,} has {self._longest_row} tokens; lower context_size, or set "
                f"disable_concat_sequences=false"
            )
        return (
            f"The {self._n_rows:,} rows of the data set have {self._n_row_tokens:,} tokens together, which do not fill "
            f"context_size={self.context_size}; lower it, or take more text"
        )
