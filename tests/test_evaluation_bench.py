"""The bench: one formula of FLOPs for text and tasks, over all batches; what is needed; methods measured alike."""

import pytest
import torch
from test_engine import BLOCKS, MODEL, TEXT

from ftp_lightning.baselines.registry import METHODS, Profile, Setting
from ftp_lightning.costs.request import row_costs
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.evaluation import record as of
from ftp_lightning.evaluation.bench import OWN_ANSWERS, Bench
from ftp_lightning.evaluation.bench import TEXT as PROSE
from ftp_lightning.evaluation.greedy import Questions
from ftp_lightning.evaluation.harness.accounts import realised_rows
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import RandomRouter, StaticRouter
from ftp_lightning.schedule import Schedule

HALF = Schedule([0.0, 0.5, 0.5, 0.5])
LENGTHS = (30, 12, 12, 20, 7)


def rows(lengths=LENGTHS):
    text = TEXT.flatten().tolist() * 4
    return Rows([Row(text[n : n + length], text[50:53], "plain", n // 2) for n, length in enumerate(lengths)])


class Letters:
    """A tokenizer of single characters, for questions of a few tokens."""

    bos_token_id = eos_token_id = None

    def encode(self, text, add_special_tokens=True, **_):
        return [ord(c) % 50 for c in text]


def questions(**more):
    items = [
        {"context": "abcdefghij" * (n + 1), "context_deleted": "j" * 10, "choices": ["a", "b"], "answer": 0,
         "document": n // 2, "distance": 10 * n, "kind": "x"} for n in range(4)
    ]  # fmt: skip
    return Questions(MODEL, Letters(), items, batch_size=2, **more)


@pytest.mark.parametrize("choice", ["topk", "threshold"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_cut_is_that_of_all_batches_and_not_of_the_last(choice, batch_size):
    """Each prompt alone, added up by hand, whatever the batches are."""
    pruner = TokenPruner(RandomRouter(1), HALF, kv="evict", choice=choice)
    items = Bench(MODEL, {PROSE: rows()}, batch_size=batch_size).measure("x", pruner)
    saved = total = 0.0
    for row, found in zip(rows().rows, items.to_dict("records"), strict=True):
        with pruner(MODEL), torch.no_grad():
            MODEL(input_ids=torch.tensor([row.prompt]), use_cache=True)
        cut = row_costs(MODEL, pruner, pruner.trace.routed).cut
        assert cut == pytest.approx(1 - found["flops"] / found["dense_flops"], abs=1e-9)
        saved, total = saved + cut * found["dense_flops"], total + found["dense_flops"]
    assert of.flops_cut(items) == pytest.approx(saved / total, abs=1e-9)


@pytest.mark.parametrize("name", ["gem_filter", "deletion_surprisal", "short_gpt", "late_blocks"])
def test_a_prompt_costs_the_same_as_text_and_as_a_task(name):
    """Looks at the prompt, removed parts and kept keys are charged in both."""
    pruner = METHODS[name].place(Setting(MODEL, influence=(0.4, 0.1, 0.3, 0.2)), 0.3, Profile(30))
    text = Bench(MODEL, {PROSE: rows((30,))}).measure(name, pruner)
    with pruner(MODEL), torch.no_grad():
        MODEL(input_ids=torch.tensor([rows((30,)).rows[0].prompt]), use_cache=True)
    [asked] = realised_rows(MODEL, pruner, [[0]])
    for column, value in asked.spent[0]._asdict().items():
        assert value == pytest.approx(text[column].iloc[0]), column


def test_own_answers_need_nothing_but_the_dense_model():
    same, other = rows(), TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.9))
    with torch.no_grad():
        answers = [MODEL(input_ids=torch.tensor([row.prompt])).logits[0, -1].argmax().item() for row in same.rows]
    own = Rows([Row(row.prompt, [answer], "own", row.document) for row, answer in zip(same.rows, answers)])
    bench = Bench(MODEL, {OWN_ANSWERS: own})
    dense = bench.measure("zero", TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.0)))
    assert dense.needed.all() and dense.right.all() and of.kept(dense).value == 1.0
    pruned = bench.measure("hard", other)
    assert of.kept(pruned).value == pruned.right.mean() and of.kept(pruned).clusters == 3


def test_questions_are_needed_where_dense_is_right_and_wrong_without_the_facts():
    ask, pruner = questions(), TokenPruner(StaticRouter(), HALF)
    bench = Bench(MODEL, {}, ask)
    items = bench.measure("x", pruner)
    answer = Letters().encode("a")

    def right(key):
        """Whether the most probable token is the answer, item by item."""
        found = [MODEL(input_ids=torch.tensor([Letters().encode(item[key])])).logits[0, -1] for item in ask.items]
        return [[logits.argmax().item()] == answer for logits in found]

    with torch.no_grad():
        with_facts, without = right("context"), right("context_deleted")
    assert items.needed.tolist() == [a and not b for a, b in zip(with_facts, without)]
    with pruner(MODEL), torch.no_grad():
        pruned = right("context")
    assert items.right.tolist() == pruned and items.prompt_tokens.tolist() == [10, 20, 30, 40]
    assert (items.flops < items.dense_flops).all() and items.distance.tolist() == [0, 10, 20, 30]


def test_a_method_is_measured_alike_under_every_seed():
    bench = Bench(MODEL, {PROSE: rows()})
    parts = [bench.measure("random", TokenPruner(RandomRouter(seed), HALF), seed) for seed in (0, 1)]
    both = of.joined([*parts, bench.measure("static", TokenPruner(StaticRouter(), HALF))])
    found = of.difference(both, "random", "static", "kl")
    assert found.items == 2 * len(LENGTHS) and found.seeds == 2
    assert of.mean(both[both.method == "random"], "kl").value == pytest.approx(
        sum(part.kl.mean() for part in parts) / 2
    )
