"""Where the last question stands in a chat that a template has rendered."""

import pytest
import torch

from ftp_lightning import AttentionScore, Schedule, TokenPruner, UntrainedRouter, UserError
from ftp_lightning.data.chat import chat_question
from ftp_lightning.models import load_model, load_tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}\nthe end\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Who had a little dog?"},
    {"role": "assistant", "content": "The girl."},
    {"role": "user", "content": "  Where did the little dog run to? "},
]


@pytest.fixture
def tokenizer():
    made = load_tokenizer("embedded")
    made.chat_template = CHATML
    return made


def test_the_span_is_that_of_the_last_users_words(tokenizer):
    asked = chat_question(tokenizer, CHAT)
    start, end = asked.span
    assert tokenizer.decode(asked.ids[start:end]).strip() == "Where did the little dog run to?"
    suffix = tokenizer.decode(asked.ids[end:])
    assert suffix == "\nthe end\n<|assistant|>\n" and asked.window_end == len(asked.ids) - end > 0
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert asked.ids == tokenizer.encode(rendered, add_special_tokens=False)


def test_the_question_reaches_the_pruner(tokenizer):
    """Span and count of what follows say the same of a prompt; both differ from the window of the template's tokens."""
    model, asked, tables = load_model("embedded"), chat_question(tokenizer, CHAT), []
    dense = Schedule([0.0] * (len(model.model.layers) - 1) + [0.5])
    for score in (
        AttentionScore("question"),
        AttentionScore(asked.end - asked.start, window_end=asked.window_end),
        AttentionScore(asked.end - asked.start),
    ):
        pruner = TokenPruner(UntrainedRouter(("attention",)), dense, attention=score)
        score_of = pruner.router.score
        pruner.router.score = lambda context, score_of=score_of: tables.append(context.attention) or score_of(context)
        pruner.ambient.spans = (asked.span,)
        with torch.no_grad(), pruner(model):
            model(torch.tensor([asked.ids]))
    assert torch.equal(tables[0], tables[1]) and not torch.allclose(tables[0], tables[2], rtol=0.1)


def test_chats_without_a_question_are_refused(tokenizer):
    for messages in ([], CHAT[:2], [{"role": "user", "content": "  "}]):
        with pytest.raises(UserError, match="its last message"):
            chat_question(tokenizer, messages)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(UserError, match="rewrites the question"):
        chat_question(tokenizer, CHAT)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        chat_question(tokenizer, CHAT)
