"""`generate` with a pruner in force = the same decoding written out by hand, for every way of generating."""

import copy

import pytest
import torch
from families import family
from grid_cases import pairwise
from oracle import masked_dense
from test_engine import BLOCKS, relative
from test_policies import NONE_DENSE as SCHEDULE
from test_policies import router
from transformers import DynamicCache, GenerationConfig, StaticCache

from ftp_lightning import RandomRouter, StaticRouter, TokenPruner
from ftp_lightning.errors import UserError

TEXT = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(1))
TEXT[:, 7:] = TEXT[:, :7]  # so that looking up the prompt finds guesses
POLICIES = ("dense", "threshold", "strict")
MODES = ("evict", "keep")
SLIDING = ("mistral_sliding", "gemma2", "gemma3")
_MODELS = {}


def model_of(name="llama"):
    """Without an end of text: every row goes on to the last token."""
    if name not in _MODELS:
        _MODELS[name] = family(name, eos_token_id=None)
    return _MODELS[name]


MODEL = model_of()


def pruner_of(decode="dense", kv="evict"):
    return TokenPruner(router("dynamic", kv, SCHEDULE), SCHEDULE, kv=kv, decode=decode, window=5)


def generate(model, ids, new=6, **kwargs):
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new} | kwargs
    return model.generate(ids, **kwargs)


def by_hand(model, pruner, ids, new=6, pick=None, cache=None, start=0):
    """Prefill and one forward per token. The text, the logits (B, new, V), decisions N x (B, T) of attention."""
    pick = pick or (lambda logits: logits.argmax(-1, keepdim=True))
    out = model(ids[:, start:], past_key_values=cache, use_cache=True)
    keep, logits = [pruner.trace.keep], [out.logits[:, -1]]
    ids = torch.cat([ids, pick(logits[-1])], 1)
    for _ in range(new - 1):
        out = model(ids[:, -1:], past_key_values=out.past_key_values)
        keep.append(pruner.trace.keep)
        logits.append(out.logits[:, -1])
        ids = torch.cat([ids, pick(logits[-1])], 1)
    return ids, torch.stack(logits, 1), [torch.cat(parts, 1) for parts in zip(*keep)]


class Spy:
    """What every forward of the decoder brought and decided."""

    def __init__(self, model, pruner):
        self.tokens, self.keep, self.phases = [], [], []
        self._pruner, self._run = pruner, model.model.forward
        model.model.__dict__["forward"] = self
        self._model = model

    def __call__(self, *args, **kwargs):
        output = self._run(*args, **kwargs)
        trace = self._pruner.trace
        self.tokens.append(trace.keep[0].shape[1])
        self.keep.append(trace.keep)
        self.phases.append("prompt" if trace.prompt is trace else "continuation")
        return output

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._model.model.__dict__["forward"] = self._run


@pytest.mark.parametrize(("name", "decode", "kv"), pairwise(["llama", *SLIDING], POLICIES, MODES))
def test_greedy_is_the_masked_twins(name, decode, kv):
    model, pruner = model_of(name), pruner_of(decode, kv)
    with torch.no_grad(), pruner(model):
        out = generate(model, TEXT, return_dict_in_generate=True, output_logits=True)
        twice = generate(model, TEXT)
        text, logits, keep = by_hand(model, pruner, TEXT)
    assert torch.equal(out.sequences, text) and torch.equal(twice, text)
    assert relative(torch.stack(out.logits, 1).double(), logits) < 1e-5
    for row in range(2):
        decisions = [k[row] for k in keep]
        expected = masked_dense(model, decisions, decisions, [kv] * BLOCKS, text[row, :-1])
        assert relative(logits[row], expected[13:]) < (1e-5 if name == "gemma2" else 1e-11)
    prompt = pruner.trace.prompt
    assert all(k.shape == TEXT.shape for k in prompt.keep)
    skipped = sum(int((~k[:, 14:]).sum()) for k in keep)
    assert skipped == 0 if decode == "dense" else skipped > 0


@pytest.mark.parametrize("decode", POLICIES)
def test_sampling_draws_what_it_draws_by_hand(decode):
    pruner, row = pruner_of(decode), TEXT[:1]
    with torch.no_grad(), pruner(MODEL):
        torch.manual_seed(5)
        text = generate(MODEL, row, do_sample=True, top_k=0, temperature=1.0)
        torch.manual_seed(5)
        expected, _, _ = by_hand(MODEL, pruner, row, pick=lambda x: torch.multinomial(x.float().softmax(-1), 1))
        assert torch.equal(text, expected)
        torch.manual_seed(6)
        three = generate(MODEL, row, do_sample=True, top_k=0, num_return_sequences=3)
        torch.manual_seed(6)
        assert torch.equal(three, generate(MODEL, row.repeat(3, 1), do_sample=True, top_k=0))
    assert len(three.unique(dim=0)) > 1


def beams_by_hand(model, pruner, ids, beams, new):
    """Beam search over texts, each scored anew from an empty cache: no cache is ever reordered."""
    best = [(0.0, ids)]
    for _ in range(new):
        grown = []
        for score, text in best:
            first = model(text[:, : ids.shape[1]], use_cache=True)
            logits = first.logits
            if text.shape[1] > ids.shape[1]:
                logits = model(text[:, ids.shape[1] :], past_key_values=first.past_key_values).logits
            logprobs = logits[0, -1].log_softmax(-1)
            for token in logprobs.topk(beams).indices:
                grown.append((score + float(logprobs[token]), torch.cat([text, token.view(1, 1)], 1)))
        best = sorted(grown, key=lambda pair: -pair[0])[:beams]
    return best


@pytest.mark.parametrize(("name", "decode", "kv"), pairwise(["llama", *SLIDING], POLICIES, MODES))
def test_beam_search_is_that_over_rebuilt_texts(name, decode, kv):
    model, pruner = model_of(name), pruner_of(decode, kv)
    with torch.no_grad(), pruner(model):
        out = generate(
            model, TEXT, 4, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True,
            length_penalty=0.0,
        )  # fmt: skip
        for row in range(2):
            expected = beams_by_hand(model, pruner, TEXT[row : row + 1], 3, 4)
            found = out.sequences[3 * row : 3 * row + 3]
            assert torch.equal(found, torch.cat([text for _, text in expected]))
            scores = torch.tensor([score for score, _ in expected], dtype=torch.float64)
            assert relative(out.sequences_scores[3 * row : 3 * row + 3].double(), scores) < 1e-5


@pytest.mark.parametrize(
    ("guesser", "name", "decode", "kv"), pairwise(["lookup", "assistant"], ["llama", *SLIDING], POLICIES, MODES)
)
def test_assisted_decoding_is_greedy(guesser, name, decode, kv):
    """Guesses that came with the prompt are no prompt, and guesses taken back leave nothing behind."""
    model, pruner, row = model_of(name), pruner_of(decode, kv), TEXT[:1]
    if guesser == "lookup":
        options = {"prompt_lookup_num_tokens": 4}
    else:
        assistant = copy.deepcopy(model)  # dense: right often, not always
        assistant.generation_config.num_assistant_tokens = 4
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        options = {"assistant_model": assistant}
    with torch.no_grad(), pruner(model):
        expected, logits, _ = by_hand(model, pruner, row, 9)
        with Spy(model, pruner) as spy:
            out = generate(model, row, 9, return_dict_in_generate=True, output_logits=True, **options)
    assert torch.equal(out.sequences, expected)
    assert relative(torch.stack(out.logits, 1).double(), logits) < 1e-5
    assert any(1 < n <= 5 for n in spy.tokens) and pruner.trace.prompt.keep[1].shape == row.shape


def test_assisted_decoding_from_the_models_own_settings():
    """Guesses are also found where the model's settings, or a position, ask for them."""
    model, pruner, row = copy.deepcopy(MODEL), pruner_of(), TEXT[:1]
    with torch.no_grad(), pruner(MODEL):
        expected, _, _ = by_hand(MODEL, pruner, row)
        prompt = pruner.trace.prompt
    again, assistant = pruner_of(), copy.deepcopy(MODEL)
    with torch.no_grad(), again(model):
        config = GenerationConfig(max_new_tokens=6, do_sample=False)
        found = [model.generate(row, config, None, None, None, None, assistant)]
        traces = [again.trace.prompt]
        model.generation_config.prompt_lookup_num_tokens = 4
        found.append(model.generate(row, generation_config=config))
        traces.append(again.trace.prompt)
        model.generation_config.prompt_lookup_num_tokens = None
        model.generation_config.use_cache = False
        with pytest.raises(UserError, match="use_cache=False"):
            model.generate(row, generation_config=config)
    for text, trace in zip(found, traces):
        assert torch.equal(text, expected)
        assert all(torch.equal(a, b) for a, b in zip(trace.keep, prompt.keep))


@pytest.mark.parametrize("sizes", [[6, 6, 2], [13, 1]])
@pytest.mark.parametrize("decode", POLICIES)
def test_chunked_prefill_routes_every_chunk(decode, sizes):
    pruner = pruner_of(decode)
    with torch.no_grad(), pruner(MODEL):
        with Spy(MODEL, pruner) as spy:
            text = generate(MODEL, TEXT, prefill_chunk_size=sizes[0])
        cache, keep = DynamicCache(config=MODEL.config), []
        with pruner.prompt():
            for chunk in TEXT.split(sizes[0], dim=1):
                last = MODEL(chunk, past_key_values=cache)
                keep.append(pruner.trace.keep)
        token = last.logits[:, -1].argmax(-1, keepdim=True)
        expected, _, _ = by_hand(MODEL, pruner, torch.cat([TEXT, token], 1), 5, cache=cache, start=14)
    assert torch.equal(text, expected)
    assert spy.tokens == [*sizes, 1, 1, 1, 1, 1]
    assert spy.phases == ["prompt"] * len(sizes) + ["continuation"] * 5
    for found, wanted in zip(spy.keep, keep):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
        assert all((~k).any() for k in found) or found[0].shape[1] <= 2
        assert all(k[:, -1].all() for k in found)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("decode", POLICIES)
def test_a_second_turn(decode, whole, chunk):
    """generate on a filled cache: the new prompt is routed inside `prompt()` only, what is generated never is."""
    pruner, options = pruner_of(decode), {"prefill_chunk_size": chunk} if chunk else {}
    with torch.no_grad(), pruner(MODEL):
        first = generate(MODEL, TEXT, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, TEXT[:, 3:8]], 1)  # the last generated token is not in the cache yet
        mask, seen = torch.ones_like(turn), first.past_key_values.get_seq_length()
        given = turn if whole or chunk else turn[:, seen:]
        other = copy.deepcopy(first.past_key_values)
        with pruner.prompt(), Spy(MODEL, pruner) as spy:
            text = generate(MODEL, given, attention_mask=mask, past_key_values=copy.deepcopy(other), **options)
        with Spy(MODEL, pruner) as plain:
            generate(MODEL, given, attention_mask=mask, past_key_values=copy.deepcopy(other), **options)
        pieces = turn[:, seen:].split(chunk or 100, dim=1)
        with pruner.prompt():
            for piece in pieces:
                logits = MODEL(piece, past_key_values=other).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        expected, _, _ = by_hand(MODEL, pruner, torch.cat([turn, token], 1), 5, cache=other, start=turn.shape[1])
    assert torch.equal(text[:, -6:], expected[:, -6:])
    assert spy.phases == ["prompt"] * len(pieces) + ["continuation"] * 5
    assert set(plain.phases) == {"continuation"}


@pytest.mark.parametrize(("name", "decode", "kv"), pairwise(["llama", "gpt2", "opt", *SLIDING], POLICIES, MODES))
def test_left_padded_rows_generate_what_they_do_alone(name, decode, kv):
    model, pruner = model_of(name), pruner_of(decode, kv)
    ids, mask = TEXT.clone(), torch.ones_like(TEXT)
    ids[1, :5], mask[1, :5] = 0, 0
    with torch.no_grad(), pruner(model):
        options = {"return_dict_in_generate": True, "output_logits": True}
        together = generate(model, ids, attention_mask=mask, **options)
        beams = generate(model, ids, 4, attention_mask=mask, num_beams=3)
        for row, start in enumerate((0, 5)):
            text = ids[row : row + 1, start:]
            alone = generate(model, text, **options)
            assert torch.equal(together.sequences[row, start:], alone.sequences[0])
            assert relative(torch.stack(together.logits, 1)[row], torch.stack(alone.logits, 1)[0]) < 1e-5
            assert torch.equal(beams[row, start:], generate(model, text, 4, num_beams=3)[0])


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@pytest.mark.parametrize("guesses", [False, True])
def test_learned_positions(name, guesses):
    model, pruner, row = model_of(name), pruner_of("threshold", "keep"), TEXT[:1]
    with torch.no_grad(), pruner(model):
        expected, _, _ = by_hand(model, pruner, row)
        assert torch.equal(generate(model, row, **({"prompt_lookup_num_tokens": 4} if guesses else {})), expected)


@pytest.mark.parametrize("decode", POLICIES)
def test_embeddings_in_place_of_tokens(decode):
    pruner, embeds = pruner_of(decode), MODEL.get_input_embeddings()(TEXT)
    with torch.no_grad(), pruner(MODEL):
        expected = generate(MODEL, TEXT)
        trace = pruner.trace.prompt
        options = {"max_new_tokens": 6, "do_sample": False}
        for mask in ({"attention_mask": torch.ones_like(TEXT)}, {}):
            text = MODEL.generate(inputs_embeds=embeds, **mask, **options)
            assert torch.equal(text, expected[:, 14:])
            assert all(torch.equal(a, b) for a, b in zip(pruner.trace.prompt.keep, trace.keep))
        assert torch.equal(MODEL.generate(TEXT, inputs_embeds=embeds, **options), expected)


class Stream:
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 5}])
def test_a_streamer_gets_the_same_tokens(options):
    pruner, row, stream = pruner_of("strict"), TEXT[:1], Stream()
    with torch.no_grad(), pruner(MODEL):
        text = generate(MODEL, row, streamer=stream, **options)
    assert stream.got == text[0].tolist() and stream.ended


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "offloaded_static"},
        {"cache_implementation": "quantized"},
        {"generation_config": GenerationConfig(cache_implementation="quantized", max_new_tokens=2)},
        {"past_key_values": lambda: DynamicCache(config=MODEL.config, offloading=True)},
        {"past_key_values": lambda: StaticCache(config=MODEL.config, max_cache_len=32)},
        {"use_cache": False},
    ],
)
def test_caches_that_cannot_hold_chosen_tokens_are_refused(options):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    for decode in ("dense", "strict"):
        with torch.no_grad(), pruner_of(decode)(MODEL), pytest.raises(UserError, match=r"(?s)\w+ \w+.*\.\n.*\.$"):
            MODEL.generate(TEXT, attention_mask=torch.ones_like(TEXT), **{"max_new_tokens": 2} | options)
    assert torch.isfinite(MODEL(TEXT).logits).all()


def test_what_generate_leaves_behind_can_be_cropped_and_gone_on_from():
    for decode in POLICIES:
        pruner = pruner_of(decode, "keep")
        with torch.no_grad(), pruner(MODEL):
            out = generate(MODEL, TEXT, return_dict_in_generate=True)
            out.past_key_values.crop(-3)
            held = out.past_key_values.get_seq_length()
            text, _, _ = by_hand(MODEL, pruner, out.sequences[:, : held + 1], 3, cache=out.past_key_values, start=held)
        assert torch.equal(text, out.sequences[:, : held + 4])


@pytest.mark.parametrize("untrained", [RandomRouter(2), StaticRouter()])
def test_untrained_routers(untrained):
    for decode in POLICIES:
        pruner = TokenPruner(untrained, SCHEDULE, decode=decode)
        with torch.no_grad(), pruner(MODEL):
            assert torch.equal(generate(MODEL, TEXT), by_hand(MODEL, pruner, TEXT)[0])
            expected = beams_by_hand(MODEL, pruner, TEXT[:1], 2, 4)[0][1]
            assert torch.equal(generate(MODEL, TEXT[:1], 4, num_beams=2), expected)
