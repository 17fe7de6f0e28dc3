"""The interface that all evaluations share: named SAEs, a model and SAEBench's own config in, SAEBench's own files out.

The data's way: SAEs in groups that share an encoder -> activations and latents from the shared source -> SAEBench's
functions for the metric, SAE by SAE -> SAEBench's output class -> one JSON file an SAE.
"""

import dataclasses
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import TypeAdapter
from tqdm.auto import tqdm

from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.beyond_saebench import Beyond
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook, SAEView, grouped, hook_of, on_device
from sae_lens_matryoshka.bench.fingerprints import package_versions
from sae_lens_matryoshka.bench.labelled_text import LabelledText
from sae_lens_matryoshka.bench.made_from import MADE_FROM, WHOLE_SAE, config_as_json, config_differences, differences
from sae_lens_matryoshka.bench.models import Model, load_model
from sae_lens_matryoshka.bench.own_files import check_folder
from sae_lens_matryoshka.bench.upstream import (
    BaseEvalConfig,
    BaseEvalOutput,
    activation_collection,
    contained,
    general_utils,
    get_eval_uuid,
    get_sae_lens_version,
)
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.saved.fingerprints import content_hash, typed_hash
from sae_lens_matryoshka.untrusted.bounded import load_json

Config = TypeVar("Config", bound=BaseEvalConfig)
DEFAULT_LLM_BATCH_SIZE = 32
"""SAEBench's batch size for the models of 2 billion parameters and more."""


class Evaluation(ABC, Generic[Config]):
    """One of SAEBench's evaluations, for any number of SAEs and levels at once.

    Args:
        config: SAEBench's own config. Its ``llm_dtype``, and what it leaves open of ``model_name`` and
            ``llm_batch_size``, are filled in.
        data: The user's own text, where the evaluation takes any.
    """

    name: ClassVar[str]
    """Names the folder of the results, as SAEBench's plots expect it."""

    output_type: type[Any]
    """SAEBench's output class."""

    reads_model: ClassVar[bool] = True
    """Whether results depend on the language model, and not on the SAE alone."""

    takes_baselines: ClassVar[bool] = False
    """Whether random baselines are evaluated beside the SAEs where a call asks for them."""

    def __init__(self, config: Config, data: Sequence[LabelledText] = ()) -> None:
        self.given_config = config
        self.config = config
        self.data = {text.name: text for text in data}
        self.skipped: list[str] = []
        """What was left out, a sentence each."""
        self.done: list[EvaluatedSAE] = []
        """What the last run has made results of, or has found them whole and made from the same."""

    def run(
        self,
        saes: Sequence[EvaluatedSAE],
        model: "Model | ActivationSource | str | Path",
        output: str | Path,
        hook_name: str | None = None,
        force: bool = False,
    ) -> list[Path]:
        """Evaluate every SAE and write a result each.

        Args:
            saes: What to evaluate; see :func:`levels`.
            model: The model, its name or folder, or a source of its activations that several evaluations share.
            output: Results go to a folder in it that is named after the evaluation.
            hook_name: TransformerLens's name of the hook; None takes each SAE's own.
            force: Whether finished results are made again. Otherwise they are kept.

        Returns:
            The result files, in the order of ``saes``.

        Raises:
            UserError: If something cannot be evaluated, or a result is there that was made with another config or SAE.
        """
        folder = Path(output).expanduser() / self.name
        check_folder(folder)
        source = model if isinstance(model, ActivationSource) else ActivationSource(load_model(model))
        self.begin(source)
        saes = on_device(saes, source.device, source.dtype)
        groups = grouped(saes)
        paths = {sae: Path(general_utils.get_results_filepath(str(folder), sae.name, sae.sae_id)) for sae in saes}
        if len(set(paths.values())) < len(paths):  # SAEBench writes a "/" as "_"
            raise UserError(f"Two of {', '.join(map(str, saes))} would have the same result file; rename one.")
        with tqdm(total=len(saes), desc=self.name) as progress:
            for group in groups:
                hook = hook_of(group[0].sae, hook_name)
                if self.reads_model:
                    source.check_hook(hook, group[0])
                shared = self.inputs(source) | ({"hook": hook.name} if self.reads_model else {})
                made_from = {sae: self.inputs_of_sae(sae, source) | shared for sae in group}
                unfinished = [sae for sae in group if force or not self._finished(paths[sae], sae, made_from[sae])]
                self.done += [sae for sae in group if sae not in unfinished]
                progress.update(len(group) - len(unfinished))
                whole = typed_hash(group[0].sae) if unfinished else None
                results = self.evaluate(unfinished, hook, source) if unfinished else iter(())
                while True:
                    with contained():
                        result = next(results, None)
                    if result is None:
                        break
                    sae, eval_output = result
                    record = {**made_from[sae], WHOLE_SAE: whole}
                    eval_output.sae_cfg_dict["metadata"][MADE_FROM] = record  # type: ignore[index]
                    self._write(paths[sae], eval_output)
                    self.done.append(sae)
                    progress.update()
        return [paths[sae] for sae in saes if sae in self.done]

    @abstractmethod
    def evaluate(
        self, group: Sequence[EvaluatedSAE], hook: Hook, source: ActivationSource
    ) -> Iterator[tuple[EvaluatedSAE, BaseEvalOutput]]:
        """Evaluate SAEs that share an encoder, inside :func:`contained`; yields each as soon as it is done.

        Args:
            group: Levels of one SAE, or one SAE without levels.
            hook: Where its activations are taken.
            source: What it shares with all others.
        """

    def view(self, sae: EvaluatedSAE, hook: Hook, source: ActivationSource) -> SAEView:
        """The SAE, or the level cut out, as SAEBench takes it."""
        view = SAEView(sae.cut_out, hook, source.name)
        general_utils.load_and_format_sae(sae.name, view, str(source.device))  # type: ignore[arg-type]
        return view

    def begin(self, source: ActivationSource) -> None:
        """Forget what an earlier run was about: this one may be on another model, or on one that has been changed."""
        source.look_again()
        self.skipped, self.done = [], []
        self.config = self.given_config
        self.config = self.completed(source)

    def inputs(self, source: ActivationSource) -> dict[str, Any]:
        """Names by content of what the results of all SAEs are made from beside the config: text, model, versions."""
        data = [[name, text.train, text.test] for name, text in self.data.items()]
        shared = {"data": content_hash(data) if data else None, "packages": package_versions()}
        return shared | ({"model": source.model_hash, "tokenizer": source.tokenizer_hash} if self.reads_model else {})

    def inputs_of_sae(self, sae: EvaluatedSAE, source: ActivationSource) -> dict[str, Any]:
        """Names by content of what only an SAE's own result is made from."""
        return {"sae": sae.hash}

    def output(
        self,
        sae: EvaluatedSAE,
        view: SAEView,
        metrics: Any,
        details: Sequence[Any] | None,
        more: Any = None,
        beyond: Beyond | None = None,
    ) -> Any:
        """SAEBench's output of an SAE, which makes its own classes of what it is given.

        Args:
            sae: The SAE.
            view: The same as SAEBench takes it.
            metrics: Category -> metric -> value.
            details: The fields of each of SAEBench's details.
            more: What SAEBench keeps as it is, in ``eval_result_unstructured``.
            beyond: What there is to say that is not SAEBench's.
        """
        return self.output_type(
            eval_config=self.config_for(sae),
            eval_id=get_eval_uuid(),
            datetime_epoch_millis=int(time.time() * 1000),
            eval_result_metrics=metrics,
            eval_result_details=details,
            eval_result_unstructured=more if beyond is None else beyond.added_to(more),
            # the release; SAEBench itself records the commit of the user's working directory
            sae_bench_commit_hash=f"sae-bench {version('sae-bench')}",
            sae_lens_id=sae.sae_id,
            sae_lens_release_id=sae.name,
            sae_lens_version=get_sae_lens_version(),
            sae_cfg_dict=view.cfg.to_dict(),
        )

    def skip(self, sae: EvaluatedSAE, why: str) -> None:
        """Leave an SAE out and say why in a sentence."""
        self.skipped.append(f"{self.name} leaves out {sae}: {why}")

    def completed(self, source: ActivationSource) -> Config:
        """The config with what it leaves open: SAEBench fills these in from its command line."""
        changes: dict[str, Any] = {"llm_dtype": general_utils.dtype_to_str(source.dtype)}
        if not getattr(self.config, "model_name", None):
            changes["model_name"] = source.name
        if getattr(self.config, "llm_batch_size", 0) is None:
            known = activation_collection.LLM_NAME_TO_BATCH_SIZE
            changes["llm_batch_size"] = known.get(source.name, DEFAULT_LLM_BATCH_SIZE)
        return dataclasses.replace(self.config, **changes)

    def config_for(self, sae: EvaluatedSAE) -> Config:
        """The config that an SAE is evaluated with, where it must differ for some."""
        return self.config

    def _finished(self, path: Path, sae: EvaluatedSAE, made_from: dict[str, Any]) -> bool:
        """Whether there is a result that was made from exactly what a new one would be made from.

        Raises:
            UserError: If there is one that was made from something else.
        """
        try:
            existing = load_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            self.skipped.append(f"{path} could not be read ({error}) and is made again.")
            return False
        try:
            was_made_from = existing["sae_cfg_dict"]["metadata"][MADE_FROM]
            differs = config_differences(existing["eval_config"], config_as_json(self.config_for(sae)), made_from)
            differs += differences(was_made_from, made_from)
            problem = f"was made with {'; '.join(differs)}" if differs else None
        except (KeyError, TypeError, AttributeError):
            problem = "is not a result of this evaluation"
        if problem is not None:
            raise UserError(f"{path} {problem}. Choose another output, or replace it with force (--force).")
        return True

    def _write(self, path: Path, eval_output: BaseEvalOutput) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as staging:
            staged = Path(staging) / path.name
            eval_output.to_json_file(str(staged), indent=2)
            TypeAdapter(self.output_type).validate_json(staged.read_text(encoding="utf-8"))
            with staged.open("rb+") as file:  # on disk before it has its name, or a power failure leaves it empty
                os.fsync(file.fileno())
            staged.replace(path)
