"""The tables of a model card: levels, training settings, benchmark results."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from sae_lens_matryoshka.saved.level_figures import FIGURE_HEADINGS
from sae_lens_matryoshka.untrusted.bounded import is_whole_number
from sae_lens_matryoshka.untrusted.terminal import printable


def levels_table(widths: Sequence[int], figures: Sequence[dict[str, str]]) -> str:
    """Width of every level and, where ``figures`` has the rows of ``levels.csv``, what was measured of it."""
    if not figures:
        return markdown_table(["level", "width"], [(str(level), str(width)) for level, width in enumerate(widths)])
    rows: list[tuple[str, ...]] = []
    for level, (width, row) in enumerate(zip(widths, figures, strict=True)):
        numbers = [_number(row.get(name) or "-", form) for name, form in _LEVEL_NUMBERS.items()]
        rows.append(
            (str(level), str(width), *numbers, *(_count(row.get(name) or "-", width) for name in _LEVEL_COUNTS))
        )
    return markdown_table(["level", "width", *FIGURE_HEADINGS], rows)


def settings_table(cfg: dict[str, Any], run_settings: dict[str, Any]) -> str:
    """How an SAE was trained, as far as its config, as SAELens 6 writes it, and its run's config tell."""
    metadata = cfg.get("metadata") or {}
    details = metadata.get("training_architecture_details") or {}
    facts: dict[str, Any] = {
        "model": metadata.get("model_name"),
        "hook": metadata.get("hook_name"),
        "data set": metadata.get("dataset_path"),
        "d_in": cfg.get("d_in"),
        "d_sae": cfg.get("d_sae"),
        "data type": cfg.get("dtype"),
        "trained as": metadata.get("training_architecture"),
        **{name: value for name, value in details.items() if name != "matryoshka_widths"},
        "normalize_activations": cfg.get("normalize_activations"),
        "context_size": metadata.get("context_size"),
        **{name: run_settings.get(name) for name in _RUN_FIELDS},
        "SAELens version": metadata.get("sae_lens_training_version"),
    }
    rows = [(name, _text(value)) for name, value in facts.items() if value not in (None, "", [], {})]
    return markdown_table(["setting", "value"], rows)


def results_table(rows: Sequence[dict[str, str]]) -> str:
    """Benchmark results, a metric a row and a level a column, from rows as :class:`hub.results.Results` has them."""
    columns = sorted({_column(row) for row in rows})
    cells: dict[tuple[str, str], dict[tuple[int, str], str]] = {}
    for row in rows:
        key = (row.get("evaluation") or "", row["metric"])
        cells.setdefault(key, {})[_column(row)] = _number(row["value"], ".4g")
    header = ["evaluation", "metric", *(name for _, name in columns)]
    body = [(*key, *(values.get(column, "") for column in columns)) for key, values in cells.items()]
    table = markdown_table(header, body)
    if len(body) <= _LONG_TABLE:
        return table
    return f"<details>\n<summary>{len(body)} metrics</summary>\n\n{table}\n\n</details>"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose cells are text, whatever is in them."""
    lines = [map(literally, header), ["---"] * len(header), *(map(literally, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def literally(text: str) -> str:
    """Somebody's text in Markdown: as it is where it is plain, else as code, where it is no link, picture or HTML."""
    text = printable(" ".join(text.split())).replace("<!--", "<! --")  # which would hide or end a part of the card
    if re.fullmatch(_PLAIN, text) and not re.search(r"www\.|://", text, re.IGNORECASE):
        return text
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if text.startswith("`") or text.endswith("`") else ""
    # tables need pipes escaped in code, too; in them \\ is one escape, and would leave the pipe without
    escaped = text.replace(r"\|", r"\ |").replace("|", r"\|")
    return f"{fence}{edge}{escaped}{edge}{fence}"


_LEVEL_NUMBERS = {"l0": ".2f", "fvu": ".4f", "fvu_standardized": ".4f"}
_LEVEL_COUNTS = ("dead", "dense", "above_half")
_LONG_TABLE = 40
_LONG_TEXT = 300
_PLAIN = r"(?:[\w(-][\w .,:;+%()/=-]*)?"
_RUN_FIELDS = (
    "training_tokens",
    "training_samples",
    "batch_size",
    "train_batch_size_tokens",
    "lr",
    "lr_scheduler_name",
    "lr_warm_up_steps",
    "lr_decay_steps",
    "lr_end",
    "adam_beta1",
    "adam_beta2",
    "autocast",
    "autocast_lm",
    "dead_feature_window",
    "seed",
)


def _column(row: dict[str, str]) -> tuple[int, str]:
    """Position and heading of a result's level."""
    level, width = (_number(row.get(name) or "", ".0f") for name in ("level", "width"))
    position = int(level) if is_whole_number(level) else -1
    if level and width:
        return position, f"level {level} ({width})"
    return position, f"level {level}" if level else width or "value"


def _count(text: str, width: int) -> str:
    return f"{text} ({int(text) / width:.1%})" if is_whole_number(text) else text


def _number(text: str, form: str) -> str:
    try:
        return format(float(text), form)
    except ValueError:
        return text


def _text(value: Any) -> str:
    is_large = isinstance(value, int) and not isinstance(value, bool) and value >= 10_000
    text = f"{value:,}" if is_large else str(value)
    return text if len(text) <= _LONG_TEXT else f"{text[:_LONG_TEXT]}..."
