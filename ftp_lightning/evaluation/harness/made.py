"""lm-eval's definitions of the tasks whose rows are made here: choices, generated answers, last words."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ftp_lightning.data.task_names import GENERATED, LAST_WORD, MADE, READING, TWINNED
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.harness.results import METRICS
from ftp_lightning.evaluation.harness.task_data import read_rows

CONTEXTS = dict.fromkeys(MADE, "context") | {f"{name}_deleted": "context_deleted" for name in TWINNED}
"""Task -> the field of its rows that holds the prompt."""

Rows = Callable[..., list[dict]]
"""Reads the rows, and checks that each has the keys given."""


def made_task(name: str, jsonl_path: str | Path, cache_dir: str | Path | None = None) -> dict:
    """The lm-eval task `name` on JSONL rows as `stages.task_files.MAKERS` makes them; more keys pass through.

    cache_dir: where `datasets` puts its copy. UserError for an unknown name, a missing file, or a row without a key.
    """
    if name not in CONTEXTS:
        raise unknown_task(name, CONTEXTS)
    base = name.removesuffix("_deleted")
    define = _generated if base in GENERATED else _last_word if base == LAST_WORD else _choice
    return {
        "task": name,
        **local_data({"test": jsonl_path}, cache_dir),
        "test_split": "test",
        "doc_to_text": f"{{{{{CONTEXTS[name]}}}}}",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
        **define(base, lambda *keys: read_rows(name, Path(jsonl_path), (CONTEXTS[name], *keys))),
    }


def _choice(name: str, rows: Rows) -> dict:
    """exact_match: the gold choice is the greedy continuation. Choices begin with their space, hence no delimiter."""
    rows("choices", "answer")
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": _means(METRICS),
    }


def _last_word(name: str, rows: Rows) -> dict:
    """As lm-eval's lambada_openai."""
    rows("target")
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    return {
        "output_type": "loglikelihood",
        "doc_to_target": "{{' ' + target}}",
        "metric_list": [perplexity, *_means(("acc",))],
    }


def _generated(name: str, rows: Rows) -> dict:
    """Greedy answers as long as the longest gold answer of the rows takes, and a few tokens more."""
    most = max(row["new_tokens"] for row in rows("gen_prefix", "outputs", "new_tokens"))
    score, metrics, delimiter, until = FORMS.get(name, NEEDLES)
    return {
        "output_type": "generate_until",
        "doc_to_target": "{{outputs}}",
        "gen_prefix": "{{gen_prefix}}",
        "target_delimiter": delimiter,
        "generation_kwargs": {"until": until, "do_sample": False, "max_gen_toks": most},
        "process_results": score,
        "metric_list": _means(metrics),
    }


def _means(metrics: Iterable[str]) -> list[dict]:
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]


def all_scores(doc: dict, results: list[str]) -> dict[str, float]:
    """The share of the gold answers that are in the text, by RULER's own function."""
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    return {"string_match": string_match_all(postprocess_pred(results), [doc["outputs"]])}


def part_scores(doc: dict, results: list[str]) -> dict[str, float]:
    """RULER's score of its questions, and whether any gold answer is in the text."""
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_part

    score = string_match_part(postprocess_pred(results), [doc["outputs"]])
    return {"string_match": score, "contains": contains(doc, results)}


def reading_scores(doc: dict, results: list[str]) -> dict[str, float]:
    """The best over the gold answers, by SQuAD's normaliser as lm-eval has it for MLQA."""
    from lm_eval.tasks.mlqa.utils import exact_match_score, f1_score

    text = results[0].strip()
    return {
        "exact_match": float(max(exact_match_score(text, gold, "en") for gold in doc["outputs"])),
        "f1": float(max(f1_score(text, gold, "en") for gold in doc["outputs"])),
        "contains": contains(doc, results),
    }


def contains(doc: dict, results: list[str]) -> float:
    """Whether a gold answer stands in the text, by the function of lm-eval's squad_completion."""
    from lm_eval.tasks.squad_completion.task import contains_score

    return float(contains_score(results[0], doc["outputs"]))


Form = tuple[Callable[[dict, list[str]], dict[str, float]], tuple[str, ...], str, list[str]]
"""Scores of an answer, their names, what stands before "Answer:", and the texts that end an answer."""

NEEDLES: Form = (all_scores, ("string_match",), " ", [])
FORMS: dict[str, Form] = {
    "ruler_cwe": (all_scores, ("string_match",), "\n\n", []),
    "ruler_qa": (part_scores, ("string_match", "contains"), " ", []),
    **dict.fromkeys(READING, (reading_scores, ("exact_match", "f1", "contains"), "\n", ["\n"])),
}
"""Of the tasks that differ from RULER's needles."""


def unknown_task(name: str, known: Iterable[str]) -> UserError:
    """The sentence for a name that nobody knows, with the nearest ones that are known."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return UserError(
        f"unknown task {name!r}\n" + (f"Did you mean {', '.join(close)}?" if close else "See lm-eval's list.")
    )


def local_data(files: Mapping[str, Any], cache_dir: str | Path | None) -> dict:
    """lm-eval's keys for JSONL files; absolute, as it reads relative ones from the working directory."""
    options = {"data_files": {split: str(Path(path).resolve()) for split, path in files.items()}}
    return {"dataset_path": "json", "dataset_kwargs": options | ({"cache_dir": str(cache_dir)} if cache_dir else {})}
