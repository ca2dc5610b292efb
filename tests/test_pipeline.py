"""What people put around a model: transformers' pipeline, chat templates, streamers; on the embedded model."""

import threading

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer, pipeline

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.models import load

TEXTS = [
    "Anna has a red box. The box is in the garden. Tom walks to the river and sits down.",
    "The old clock struck nine.",
    "A small dog ran over the bridge, and the children followed it as fast as they could, until it was dark.",
    "Once there was a king who",
]
ASKED = {"max_new_tokens": 6, "do_sample": False}
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def embedded():
    return load("embedded")


@pytest.fixture(params=["evict", "keep"])
def pruned(request, embedded):
    """(model, tokenizer, pruner in force)."""
    model, tokenizer = embedded
    blocks = model.config.num_hidden_layers
    pruner = TokenPruner(StaticRouter(), Schedule([0.0] + [0.5] * (blocks - 1)), kv=request.param)
    with pruner(model):
        yield model, tokenizer, pruner


@torch.no_grad()
def generated(model, tokenizer, text, **more):
    """The ids after one prompt by itself."""
    inputs = tokenizer(text, return_tensors="pt")
    return model.generate(**inputs, **ASKED, **more)[0, inputs["input_ids"].shape[1] :]


def made(model, tokenizer):
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    generator.tokenizer.padding_side = "left"
    return generator


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pipeline_gives_what_each_row_gives_alone(pruned, batch_size):
    model, tokenizer, pruner = pruned
    outputs = made(model, tokenizer)(TEXTS, batch_size=batch_size, return_full_text=False, **ASKED)
    assert pruner.trace.prompt.real.shape[0] == batch_size
    for text, output in zip(TEXTS, outputs):
        alone = tokenizer.decode(generated(model, tokenizer, text), skip_special_tokens=True)
        assert output[0]["generated_text"] == alone


def test_pipeline_really_prunes(pruned):
    model, tokenizer, pruner = pruned
    made(model, tokenizer)(TEXTS[0], **ASKED)
    prompt = pruner.trace.prompt
    assert prompt.sparsity[0] == 0.0 and all(0.4 < s <= 0.5 for s in prompt.sparsity[1:])
    assert prompt.real.shape[1] == len(tokenizer(TEXTS[0])["input_ids"])


def test_chat_messages_through_a_template(pruned, monkeypatch):
    model, tokenizer, pruner = pruned
    monkeypatch.setattr(tokenizer, "chat_template", CHAT, raising=False)
    messages = [{"role": "user", "content": TEXTS[0]}]
    answer = made(model, tokenizer)(messages, **ASKED)[0]["generated_text"]
    assert answer[:-1] == messages and answer[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    new = model.generate(**inputs, **ASKED)[0, inputs["input_ids"].shape[1] :]
    assert answer[-1]["content"] == tokenizer.decode(new, skip_special_tokens=True)
    assert pruner.trace.prompt.real.shape[1] == inputs["input_ids"].shape[1]


def test_text_streamer_prints_what_is_generated(pruned, capsys):
    model, tokenizer, _ = pruned
    expected = tokenizer.decode(generated(model, tokenizer, TEXTS[0]), skip_special_tokens=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generated(model, tokenizer, TEXTS[0], streamer=streamer)
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")


def test_iterator_streamer_with_generation_in_a_thread(pruned):
    model, tokenizer, pruner = pruned
    expected = tokenizer.decode(generated(model, tokenizer, TEXTS[0]), skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(
        target=generated, args=(model, tokenizer, TEXTS[0]), kwargs={"streamer": streamer}, daemon=True
    )
    thread.start()
    pieces = list(streamer)
    thread.join(60)
    assert "".join(pieces) == expected and len(pieces) > 1
    assert pruner.trace.prompt.sparsity[1] > 0.4
