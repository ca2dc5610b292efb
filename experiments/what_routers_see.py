"""Do a router's inputs tell tokens that a question may need from the prose around them?  python
experiments/what_routers_see.py --help

Facts are set into prose, as in the questions everything is measured with; the dense model reads them. Per block: the
area under the ROC curve (0.5 = by chance) with which a two-layer probe of 64 units, fitted on half of the passages,
tells tokens of facts from prose in the other half, by what a router of that block sees. It is the mean over passages of
the share of (fact token, prose token) pairs in the right order. The first token and the last `--tail` (the question)
count for neither.
"""

import argparse
import random

import torch
from torch import Tensor

INPUTS = ("position and attention", "and the last update's size", "and every update's size", "hidden state")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument(
        "--data", default="embedded", help="text that the facts are set into; used whole unless embedded"
    )
    parser.add_argument("--passages", type=int, default=64)
    parser.add_argument("--prompt_tokens", type=int, default=192)
    parser.add_argument("--tail", type=int, default=16)
    parser.add_argument("--window", type=int, default=32, help="queries of the attention score")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def passages(args, tokenizer) -> tuple[Tensor, Tensor]:
    """Token ids (n, P), question included, and which of them belong to a fact."""
    from ftp_lightning.data.filler import Filler
    from ftp_lightning.data.recall import build_passage, draw_facts, fact_count
    from ftp_lightning.data.sources import load_documents

    rng = random.Random(args.seed)
    filler = Filler(tokenizer, load_documents(args.data, "validation" if args.data == "embedded" else "all"))
    rows, labels = [], []
    for _ in range(args.passages):
        prose, _ = filler.draw(rng, args.prompt_tokens)
        facts = draw_facts(rng, fact_count(rng, args.prompt_tokens))
        question = tokenizer.encode(f"\n{facts[0].question}", add_special_tokens=False)
        passage = build_passage(rng, tokenizer, prose, facts, args.prompt_tokens - len(question))
        label = torch.zeros(args.prompt_tokens, dtype=torch.bool)
        for fact, end in zip(passage.facts, passage.fact_ends):
            label[end - len(tokenizer.encode(f" {fact.sentence}", add_special_tokens=False)) : end] = True
        rows.append(passage.prompt_ids + question)
        labels.append(label)
    return torch.tensor(rows), torch.stack(labels)


@torch.no_grad()
def seen(model, ids: Tensor, window: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of every block its input (n, P, D), and the attention score (n, P) that it writes."""
    from ftp_lightning.pruning.listening import listening

    with listening(model, window) as heard:
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    return [state.float() for state in states[:-1]], heard


def inputs_of(block: int, states: list[Tensor], heard: list[Tensor]) -> dict[str, Tensor]:
    """(n, P, k) of each kind of input at a block after the first."""
    tokens = states[0].shape[1]
    place = (torch.arange(tokens) / (tokens - 1)).expand(len(states[0]), tokens)
    updates = [(after - before).norm(dim=-1) / before.norm(dim=-1) for before, after in zip(states, states[1:])][:block]
    factors = [place, heard[block - 1].log1p()]
    kinds = [factors, [*factors, updates[-1]], [*factors, *updates]]
    unit = states[block] / states[block].square().mean(-1, keepdim=True).sqrt()
    return dict(zip(INPUTS, [*(torch.stack(kind, -1) for kind in kinds), unit]))


def probed(inputs: Tensor, facts: Tensor, prose: Tensor, seed: int) -> float:
    """AUC on the second half of the passages, of a probe that was fitted on the first."""
    half = len(inputs) // 2
    counted = (facts | prose)[:half]
    x, y = inputs[:half][counted], facts[:half][counted].float()
    mean, spread = x.mean(0), x.std(0) + 1e-6
    torch.manual_seed(seed)
    probe = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(probe.parameters(), 3e-3, weight_decay=1e-4)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(probe((x - mean) / spread)[:, 0], y).backward()
        optimizer.step()
    with torch.no_grad():
        scores = probe((inputs[half:] - mean) / spread)[..., 0]
    return area(scores, facts[half:], prose[half:])


def area(scores: Tensor, facts: Tensor, prose: Tensor) -> float:
    """Mean over rows of the share of pairs in which the fact's token has the higher score; ties count a half."""
    shares = []
    for row, high, low in zip(scores, facts, prose):
        difference = row[high][:, None] - row[low][None]
        shares.append(((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item())
    return sum(shares) / len(shares)


def main():
    args = arguments()
    from ftp_lightning.models import load

    model, tokenizer = load(args.model)
    ids, facts = passages(args, tokenizer)
    prose = ~facts
    prose[:, 0] = False
    prose[:, -args.tail :] = False
    states, heard = seen(model, ids, args.window)
    print(f"| block | {' | '.join(INPUTS)} |\n|---{'|---' * len(INPUTS)}|")
    for block in range(1, len(states)):
        found = {
            name: probed(values, facts, prose, args.seed) for name, values in inputs_of(block, states, heard).items()
        }
        print(f"| {block + 1} | {' | '.join(f'{found[name]:.2f}' for name in INPUTS)} |", flush=True)


if __name__ == "__main__":
    main()
