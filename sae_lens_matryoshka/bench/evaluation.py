"""The interface that all evaluations share: named SAEs, a model and SAEBench's own config in, SAEBench's own files out.

The data's way: SAEs in groups that share an encoder -> activations and latents from the shared source -> SAEBench's
functions for the metric, SAE by SAE -> SAEBench's output class -> one JSON file an SAE.
"""

import dataclasses
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import TypeAdapter
from tqdm.auto import tqdm

from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.cache import content_hash
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook, SAEView, grouped, hook_of, on_device
from sae_lens_matryoshka.bench.labelled_text import LabelledText
from sae_lens_matryoshka.bench.models import Model, load_model
from sae_lens_matryoshka.bench.upstream import (
    BaseEvalConfig,
    BaseEvalOutput,
    activation_collection,
    contained,
    general_utils,
    get_eval_uuid,
    get_sae_lens_version,
    sae_bench_version,
)
from sae_lens_matryoshka.errors import UserError

Config = TypeVar("Config", bound=BaseEvalConfig)
DEFAULT_LLM_BATCH_SIZE = 32
"""SAEBench's batch size for the models of 2 billion parameters and more."""

PARAMETERS_HASH = "parameters_hash"
"""Where a result's ``sae_cfg_dict["metadata"]`` says which parameters were evaluated."""

DATA_HASH = "data_hash"
"""Where it says on which text of the user's own."""


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

    def __init__(self, config: Config, data: Sequence[LabelledText] = ()) -> None:
        self.config = config
        self.data = {text.name: text for text in data}
        self.skipped: list[str] = []
        """What was left out, a sentence each."""

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
        source = model if isinstance(model, ActivationSource) else ActivationSource(load_model(model))
        self.config = self._completed(source)
        groups = grouped(on_device(saes, source.device, source.dtype))
        paths = {id(sae): self._path(Path(output), sae) for group in groups for sae in group}
        with tqdm(total=len(saes), desc=self.name) as progress:
            for group in groups:
                hook = hook_of(group[0].sae, hook_name)
                unfinished = [sae for sae in group if force or not self._finished(paths[id(sae)], sae, hook, source)]
                progress.update(len(group) - len(unfinished))
                results = self.evaluate(unfinished, hook, source) if unfinished else iter(())
                while True:
                    with contained():
                        result = next(results, None)
                    if result is None:
                        break
                    sae, eval_output = result
                    self._write(paths[id(sae)], eval_output)
                    progress.update()
        in_order = {(sae.name, sae.sae_id): paths[id(sae)] for group in groups for sae in group}
        return [path for sae in saes if (path := in_order[sae.name, sae.sae_id]).is_file()]

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

    def common_fields(self, sae: EvaluatedSAE, view: SAEView) -> dict[str, Any]:
        """What every one of SAEBench's outputs holds, whatever the evaluation."""
        sae_cfg_dict = view.cfg.to_dict()
        sae_cfg_dict["metadata"] = {
            **sae_cfg_dict["metadata"],
            PARAMETERS_HASH: view.hash,
            DATA_HASH: self._data_hash(),
        }
        return {
            "eval_config": self.config_for(sae),
            "eval_id": get_eval_uuid(),
            "datetime_epoch_millis": int(time.time() * 1000),
            "sae_bench_commit_hash": sae_bench_version(),
            "sae_lens_id": sae.sae_id,
            "sae_lens_release_id": sae.name,
            "sae_lens_version": get_sae_lens_version(),
            "sae_cfg_dict": sae_cfg_dict,
        }

    def skip(self, sae: EvaluatedSAE, why: str) -> None:
        """Leave an SAE out and say why in a sentence."""
        self.skipped.append(f"{self.name} leaves out {sae}: {why}")

    def _completed(self, source: ActivationSource) -> Config:
        """The config with what it leaves open: SAEBench fills these in from its command line."""
        changes: dict[str, Any] = {"llm_dtype": general_utils.dtype_to_str(source.dtype)}
        if not getattr(self.config, "model_name", None):
            changes["model_name"] = source.name
        if getattr(self.config, "llm_batch_size", 0) is None:
            known = activation_collection.LLM_NAME_TO_BATCH_SIZE
            changes["llm_batch_size"] = known.get(source.name, DEFAULT_LLM_BATCH_SIZE)
        return dataclasses.replace(self.config, **changes)

    def _path(self, output: Path, sae: EvaluatedSAE) -> Path:
        return Path(general_utils.get_results_filepath(str(output / self.name), sae.name, sae.sae_id))

    def _finished(self, path: Path, sae: EvaluatedSAE, hook: Hook, source: ActivationSource) -> bool:
        if not path.is_file():
            return False
        existing = json.loads(path.read_text(encoding="utf-8"))
        config = self.config_for(sae)
        differs = [
            f"{field}={existing['eval_config'].get(field)!r}, now {value!r}"
            for field, value in json.loads(json.dumps(dataclasses.asdict(config))).items()
            if existing["eval_config"].get(field) != value
        ]
        metadata = existing["sae_cfg_dict"]["metadata"]
        if metadata.get(PARAMETERS_HASH) != SAEView(sae.cut_out, hook, source.name).hash:
            differs.append("other parameters of the SAE")
        if metadata.get(DATA_HASH) != self._data_hash():
            differs.append("other text")
        if differs:
            raise UserError(
                f"{path} was made with {'; '.join(differs)}. Choose another output, or replace it with force (--force)."
            )
        return True

    def _data_hash(self) -> str | None:
        """A name for the user's own text, among it what the config does not ask for."""
        return content_hash([[name, text.train, text.test] for name, text in self.data.items()]) if self.data else None

    def config_for(self, sae: EvaluatedSAE) -> Config:
        """The config that an SAE is evaluated with, where it must differ for some."""
        return self.config

    def _write(self, path: Path, eval_output: BaseEvalOutput) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}")
        eval_output.to_json_file(str(staged), indent=2)
        TypeAdapter(self.output_type).validate_json(staged.read_text(encoding="utf-8"))
        staged.rename(path)
