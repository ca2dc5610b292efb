"""Trains a small Llama that recalls facts at a distance, from any folder of .txt files.

python experiments/pretrain/train.py --text FOLDER --tokenizer train --output runs/llama --minutes 150
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mixture import PLANS, Mixer, Phase, phase_at
from tokenizer import train_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

from ftp_lightning.data.sources import load_documents
from ftp_lightning.models import load_tokenizer, resolve_device

PEAK, FLOOR, WARMUP = 2e-3, 0.02, 100


def new_model(vocab: int, blocks: int, hidden: int) -> LlamaForCausalLM:
    """A Llama with heads of 32, half as many KV heads, an MLP of 2.75 x hidden and tied embeddings."""
    heads = max(2, hidden // 32)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def learning_rate(plan: Sequence[Phase], done: float, step: int) -> float:
    """Linear warm-up over 100 steps, constant, and over the last quarter of the last phase linearly down to 2 %."""
    return PEAK * min(1.0, (step + 1) / WARMUP, max(FLOOR, (1 - done) / (plan[-1].time / 4)))


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with decay 0.1 on matrices and none on norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))


def train_step(
    forward: Any, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, tokens: Tensor, rate: float
) -> float:
    """One step on `tokens` (B, T) in bfloat16 autocast; returns the loss in nats a token."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        loss = forward(tokens, labels=tokens, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(model: LlamaForCausalLM, mixer: Mixer, arguments: argparse.Namespace) -> list[float]:
    """Steps until `--minutes` or `--steps` are over, whichever is first; returns the loss of every step."""
    optimizer = make_optimizer(model)
    forward = torch.compile(model) if arguments.compile else model
    plan, began = PLANS[arguments.plan], time.monotonic()
    losses: list[float] = []
    while (done := progress(arguments, time.monotonic() - began, len(losses))) < 1:
        tokens = mixer.batch(phase_at(plan, done), arguments.batch_size).to(model.device)
        losses.append(train_step(forward, model, optimizer, tokens, learning_rate(plan, done, len(losses))))
        if len(losses) % 50 == 0:
            print(f"step {len(losses)}, {done:.0%}: loss {losses[-1]:.3f}", flush=True)
    return losses


def progress(arguments: argparse.Namespace, seconds: float, steps: int) -> float:
    """The share of the training that is over, in time or in steps."""
    by_steps = steps / arguments.steps if arguments.steps else 0.0
    return max(seconds / (60 * arguments.minutes), by_steps)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, losses: list[float], output: Path) -> None:
    """A Hugging Face folder (bfloat16 safetensors) and the losses."""
    logging.disable_progress_bar()
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "losses.json").write_text(json.dumps([round(loss, 4) for loss in losses]))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="folder of .txt files (form feeds may separate books within one)")
    parser.add_argument(
        "--tokenizer", default="embedded", help="a tokenizer by name or folder, or 'train': a new BPE on the text"
    )
    parser.add_argument("--vocab", type=int, default=4096, help="size of a newly trained tokenizer")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=150)
    parser.add_argument("--steps", type=int, help="stop after so many steps even if time is left")
    parser.add_argument("--plan", choices=PLANS, default="recipe", help="order of the phases, see mixture.py")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model (minutes at first, then faster)"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    torch.manual_seed(arguments.seed)
    documents = load_documents(arguments.text, "all")
    tokenizer = (
        train_tokenizer(documents, arguments.vocab)
        if arguments.tokenizer == "train"
        else load_tokenizer(arguments.tokenizer)
    )
    mixer = Mixer(tokenizer, documents, arguments.window, random.Random(arguments.seed))
    model = new_model(len(tokenizer), arguments.blocks, arguments.hidden).to(resolve_device(arguments.device)).train()
    losses = train(model, mixer, arguments)
    save(model, tokenizer, losses, arguments.output)
    print(f"{len(losses)} steps, last loss {losses[-1]:.3f}, saved in {arguments.output}")


if __name__ == "__main__":
    main()
